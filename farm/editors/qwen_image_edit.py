"""The teacher Qwen-Image-Edit: a 20 B flow transformer that reads the photo's latents, and the instruction together
with the photo through a vision language model (Qwen team, arXiv:2508.02324). Weights under Apache 2.0.

This is the model's QwenImageEditPlusPipeline of diffusers as a loop over its parts, for two faults of the pipeline:
- it scales the photo to one megapixel whatever height and width are asked for, and where these differ the edit comes
  out zoomed, of no use in a pair (huggingface/diffusers#12453);
- with transformers 5 it forgets to tell the language model which tokens are the photo's, which then reads them as a
  line of text and not as a picture (huggingface/diffusers#14194).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from farm.editors.base import Prompt
from farm.editors.diffusion import (
    MULTIPLE,
    DiffusionEditor,
    DiffusionSettings,
    check_prompt_length,
    generators,
    load_pipeline,
    prompt_text,
)
from farm.editors.flow import check_pipeline, packable
from farm.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as PILImage
    from torch import Tensor

PICTURE = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
"""What stands for the photo before the instruction."""

PICTURE_SIDE = 384
"""Side of the square with as many pixels as what the language model sees of a photo."""


class QwenImageEditSettings(DiffusionSettings):
    """Read: `prompt.instruction`. Defaults are the model card's.

    model: a release that comes as a QwenImageEditPlusPipeline, so 2509 and later. The first one is refused: 2509 was
    made to keep a face's identity, 2511 to keep the picture from drifting, and pairs need both. dtype: float16 is not
    offered, the model overflows in it. true_cfg_scale: how far the edit is pushed from that for negative_prompt; 1
    leaves this out and halves the time. max_sequence_length: an instruction of more tokens is refused. batch_size has
    no effect: one photo fills a GPU, see `FluxKontextFamily`. The pipeline has no safety checker.
    """

    kind: Literal["qwen-image-edit"] = "qwen-image-edit"
    model: str = Field(default="Qwen/Qwen-Image-Edit-2511", min_length=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    side: int = Field(default=1024, ge=64, le=2048, multiple_of=MULTIPLE)
    steps: int = Field(default=40, ge=1, le=1000)
    true_cfg_scale: float = Field(default=4.0, ge=1)
    negative_prompt: str = " "
    max_sequence_length: int = Field(default=512, ge=8, le=1024)


class QwenImageEditFamily:
    """A `Family` around the parts of a QwenImageEditPlusPipeline.

    A photo is edited at the size it comes in, its sides reflected up to the multiple of 16 that packing 2x2 latents
    asks for, and cut back. The language model always sees it at about 384x384, as in the pipeline. Photos go through
    one at a time, as in the pipeline, so an edit is the same bytes whatever is edited with it. Nothing is kept from
    one photo to the next: the instruction's embedding is that of the photo too.

    Raises:
        UserError: see `load_pipeline`; or the model is another Qwen-Image, or has no vocabulary in its processor.
    """

    def __init__(self, settings: QwenImageEditSettings) -> None:
        from diffusers import QwenImageEditPlusPipeline

        self._settings = settings
        check_pipeline(QwenImageEditPlusPipeline, settings, "Qwen/Qwen-Image-Edit-2511")
        self._pipeline = load_pipeline(QwenImageEditPlusPipeline, settings)
        self._check_processor()

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`.

        Raises:
            UserError: there is no instruction, or it or the negative prompt has more tokens than `max_sequence_length`.
        """
        import torch

        settings, instruction = self._settings, prompt_text(prompt, "instruction")
        for text in (instruction, settings.negative_prompt):
            check_prompt_length(self._pipeline.tokenizer, text, settings.max_sequence_length, teacher=settings.model)
        photos = packable(images, self._pipeline)
        with torch.no_grad():
            edited = [
                self._edit(photo, instruction, generator)
                for photo, generator in zip(photos, generators(seeds), strict=True)
            ]
        return torch.stack(edited)[:, :, : images.shape[2], : images.shape[3]], [None] * len(edited)

    def _edit(self, image: Tensor, instruction: str, generator: torch.Generator) -> Tensor:
        """float32 `[3, h, w]` in 0..1 on the CPU, h and w multiples of 16, to the same."""
        import torch
        from torch.nn.functional import pixel_shuffle

        pipeline, guidance = self._pipeline, self._settings.true_cfg_scale
        rows, columns = (side // (2 * pipeline.vae_scale_factor) for side in image.shape[1:])

        picture = _picture(image)
        wanted = self._read(instruction, picture)
        unwanted = self._read(self._settings.negative_prompt, picture) if guidance > 1 else None

        # latents and source are [1, rows * columns, 64]: a token is 2x2 latents of 16 channels
        latents, source = pipeline.prepare_latents(
            2 * image[None, :, None] - 1,
            batch_size=1,
            num_channels_latents=pipeline.latent_channels,
            height=image.shape[1],
            width=image.shape[2],
            dtype=wanted.dtype,
            device=pipeline._execution_device,
            generator=generator,
        )

        def velocity(latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
            (predicted,) = pipeline.transformer(
                hidden_states=torch.cat([latents, source], dim=1),
                timestep=time.expand(1).to(latents.dtype) / 1000,
                encoder_hidden_states=text,
                img_shapes=[[(1, rows, columns), (1, rows, columns)]],
                return_dict=False,
            )
            return cast("Tensor", predicted[:, : latents.shape[1]])

        for time in self._timesteps(latents.shape[1]):
            step = velocity(latents, time, wanted)
            if unwanted is not None:
                step = _guided(step, velocity(latents, time, unwanted), guidance)
            (latents,) = pipeline.scheduler.step(step, time, latents, return_dict=False)

        grid = pixel_shuffle(latents.mT.unflatten(2, (rows, columns)), 2)  # [1, 16, h/8, w/8]
        edited: Tensor = pipeline.vae.decode(self._unscaled(grid[:, :, None]), return_dict=False)[0][0, :, 0]
        pipeline.maybe_free_model_hooks()  # with cpu_offload the models go back to the CPU
        return (edited.float().cpu() / 2 + 0.5).clamp(0, 1)

    def _read(self, text: str, picture: PILImage) -> Tensor:
        """What the language model makes of the picture and the text, `[1, tokens, 3584]`."""
        pipeline = self._pipeline
        inputs = pipeline.processor(
            text=[pipeline.prompt_template_encode.format(PICTURE + text)], images=[picture], return_tensors="pt"
        ).to(pipeline._execution_device)
        states = pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        return cast("Tensor", states[:, pipeline.prompt_template_encode_start_idx :])  # the template's system part cut

    def _timesteps(self, tokens: int) -> Tensor:
        """Set the scheduler to an image of so many tokens; its steps, from 1000 down."""
        import numpy as np
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

        scheduler = self._pipeline.scheduler
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        scheduler.set_timesteps(
            sigmas=np.linspace(1, 1 / self._settings.steps, self._settings.steps),
            mu=calculate_shift(tokens, *(scheduler.config[name] for name in names)),
            device=self._pipeline._execution_device,
        )
        scheduler.set_begin_index(0)
        return cast("Tensor", scheduler.timesteps)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents `[1, 16, 1, h, w]` as the autoencoder decodes them, from the transformer's, which have unit scale."""
        vae = self._pipeline.vae
        mean, deviation = (
            latents.new_tensor(values)[:, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return latents * deviation + mean

    def _check_processor(self) -> None:
        """Refuse a processor without a vocabulary: transformers makes an empty one where its files are missing."""
        rows = self._pipeline.text_encoder.config.get_text_config().vocab_size
        words = len(self._pipeline.processor.tokenizer)
        if words < rows / 2:
            raise UserError(
                f"editor.model: {self._settings.model} has a processor of {words} tokens and a text encoder for "
                f"{rows}: the processor's vocabulary files are missing; copy or fetch the model again."
            )


def open_editor(settings: QwenImageEditSettings) -> DiffusionEditor:
    """Load the model and make the teacher ready.

    Raises:
        UserError: the model is not there, or of another family.
    """
    return DiffusionEditor(settings, QwenImageEditFamily(settings))


def _picture(image: Tensor) -> PILImage:
    """float32 `[3, h, w]` in 0..1 as a picture of about 384x384 pixels: what the language model was trained to see."""
    import PIL.Image

    ratio = image.shape[2] / image.shape[1]
    size = [32 * round(PICTURE_SIDE * side / 32) for side in (math.sqrt(ratio), 1 / math.sqrt(ratio))]
    levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(levels).resize((size[0], size[1]), PIL.Image.Resampling.LANCZOS)


def _guided(wanted: Tensor, unwanted: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, each token brought back to the length it had without."""
    from torch.linalg import vector_norm

    guided = unwanted + scale * (wanted - unwanted)
    rescaling: Tensor = vector_norm(wanted, dim=-1, keepdim=True) / vector_norm(guided, dim=-1, keepdim=True)
    return guided * rescaling
