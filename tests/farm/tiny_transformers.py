"""Tiny folders of the diffusion transformers FLUX.1 Kontext and Qwen-Image-Edit: the real classes, random weights.

What Stable Diffusion's folders need too is in `tiny_diffusers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_diffusers import TEXT_WIDTH, clip_text_model, clip_tokenizer

QWEN_WORDS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The special tokens of Qwen2.5-VL that the pipeline's template and the processor use."""


def attentive(model: Any) -> Any:
    """The model with matrices three times as large: as initialised, text and photo hardly show in what it gives."""
    for weights in model.parameters():
        if weights.ndim == 2:
            weights.data.mul_(3)
    return model.eval()


def t5_tokenizer() -> Any:
    """A T5Tokenizer that spells: a token a letter, one before every word, one that ends the text."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_encoder(*, seed: int = 0) -> Any:
    """A T5EncoderModel of one layer that fits `t5_tokenizer`."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=128,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


def flux_autoencoder(*, seed: int = 0) -> Any:
    """An AutoencoderKL as FLUX has it: 16 channels, a side 8 times shorter, latents shifted, no quant convolutions."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def flux_transformer(*, seed: int = 0) -> Any:
    """A FluxTransformer2DModel of one double and one single block, guidance embedded as in the dev models."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return attentive(
        FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )


def flux_kontext(folder: Path, *, seed: int = 0) -> Path:
    """Save a FluxKontextPipeline folder and return it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux_autoencoder(seed=seed),
        text_encoder=clip_text_model(seed=seed + 1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(seed=seed + 2),
        tokenizer_2=t5_tokenizer(),
        transformer=flux_transformer(seed=seed + 3),
    ).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> Any:
    """A Qwen2Tokenizer that spells byte by byte, with the special tokens of Qwen2.5-VL."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(ByteLevel.alphabet()), *QWEN_WORDS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special = list(QWEN_WORDS[1:])
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special, model_max_length=4096)


def qwen_processor() -> Any:
    """The Qwen2VLProcessor of `qwen_tokenizer`; it shrinks a picture to at most 16 tokens of 28x28 pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    side = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=side),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=side),
    )


def qwen_text_encoder(*, seed: int = 0) -> Any:
    """A Qwen2_5_VLForConditionalGeneration, two layers for text and one for pictures, that fits `qwen_tokenizer`."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    ids = {word: 256 + index for index, word in enumerate(QWEN_WORDS)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 256 + len(QWEN_WORDS),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1_000_000.0},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return attentive(Qwen2_5_VLForConditionalGeneration(config))


def qwen_autoencoder(*, seed: int = 0) -> Any:
    """An AutoencoderKLQwenImage with the real one's 16 channels and 8 times shorter sides."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(seed)
    return AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1).eval()


def qwen_transformer(*, seed: int = 0) -> Any:
    """A QwenImageTransformer2DModel of two blocks, with the zero time of the source's tokens as in release 2511."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return attentive(
        QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=True,
        )
    )


def qwen_image_edit(folder: Path, *, seed: int = 0) -> Path:
    """Save a QwenImageEditPlusPipeline folder and return it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline

    QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        vae=qwen_autoencoder(seed=seed),
        text_encoder=qwen_text_encoder(seed=seed + 1),
        tokenizer=qwen_tokenizer(),
        processor=qwen_processor(),
        transformer=qwen_transformer(seed=seed + 2),
    ).save_pretrained(folder)
    return folder
