"""Tiny Stable-Diffusion-like model folders: the real diffusers and transformers classes, random weights, 1 MB or less.

Folders are laid out as diffusers saves them and as the hub holds them, so a family's `from_pretrained` really runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT_WIDTH = 32
"""Width of the tiny text encoder's tokens: the `d` of `[1, 77, d]`."""

NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
"""Stable Diffusion 1.5's."""


def clip_tokenizer(folder: Path | None = None) -> Any:
    """A CLIPTokenizer that spells words byte by byte: 256 symbols, the same ending a word, two special tokens.

    It reads 77 tokens, so 75 letters and digits. Saved to `folder` if given.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def clip_text_model(*, seed: int = 0, vocab_size: int = 514) -> Any:
    """A CLIPTextModel of two layers that fits `clip_tokenizer`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    ).eval()


def autoencoder(*, seed: int = 0) -> Any:
    """An AutoencoderKL from 3 to 4 channels that makes a side 8 times shorter."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=4.0,  # brings its latents to about unit variance, as a trained one's 0.18215 does
    ).eval()


UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,  # as in Stable Diffusion 1.5 this is the number of heads
    "cross_attention_dim": TEXT_WIDTH,
}
"""What a ControlNet has in common with the UNet it steers."""


def unet(*, in_channels: int = 4, seed: int = 0) -> Any:
    """A UNet2DConditionModel of two levels with cross-attention at the upper one."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        sample_size=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **UNET,
    ).eval()


def image_checker(*, flags: bool, seed: int = 0) -> Any:
    """A StableDiffusionSafetyChecker whose thresholds let it flag everything, or nothing."""
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=tower, projection_dim=8))
    checker.concept_embeds.data.normal_()
    checker.special_care_embeds.data.normal_()
    threshold = -2.0 if flags else 2.0  # of a cosine
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(threshold)
    return checker.eval()


def image_processor() -> Any:
    """The CLIPImageProcessor that goes with `image_checker`: 32x32 pixels."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def stable_diffusion(
    folder: Path,
    *,
    pipeline: Any = None,
    unet_in_channels: int = 4,
    safety_checker: bool = False,
    flags: bool = False,
    seed: int = 0,
    **components: Any,
) -> Path:
    """Save a pipeline folder of the Stable Diffusion 1 kind and return it.

    pipeline: the diffusers pipeline class to save, StableDiffusionPipeline when left out. safety_checker: have one;
    it flags every image with `flags`, else none. components: others instead of the tiny ones, or more of them, such
    as `controlnet=` or `scheduler=`.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    parts: dict[str, Any] = {
        "vae": autoencoder(seed=seed),
        "text_encoder": clip_text_model(seed=seed + 1),
        "tokenizer": clip_tokenizer(),
        "unet": unet(in_channels=unet_in_channels, seed=seed + 2),
        "scheduler": PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        "safety_checker": image_checker(flags=flags, seed=seed + 3) if safety_checker else None,
        "feature_extractor": image_processor() if safety_checker else None,
        "requires_safety_checker": safety_checker,
    }
    kind = StableDiffusionPipeline if pipeline is None else pipeline
    kind(**{**parts, **components}).save_pretrained(folder)
    return folder
