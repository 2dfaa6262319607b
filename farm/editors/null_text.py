"""Null-text inversion with prompt-to-prompt: a photo is turned into the noise and the embeddings that a text-to-image
model makes it of, and made again under another caption while attention stays where it was.

Null-text Inversion (Mokady et al. 2022) and Prompt-to-Prompt (Hertz et al. 2022), one of the teachers of E2GAN's
appendix B.1, after the authors' repository google/prompt-to-prompt (`null_text_w_ptp.ipynb`) without its local blend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from farm.editors.base import Prompt
from farm.editors.diffusion import DiffusionEditor, LatentSettings, fingerprint, prompt_text

if TYPE_CHECKING:
    from torch import Tensor

    from farm.editors.alignment import TokenMap
    from farm.editors.inversion import Inversion, InversionCache

KEPT_BYTES = 8 * 2**30
"""CPU memory for inversions. At 512x512 pixels and 50 steps a source takes 9 MB in half precision and 15 MB in float32,
so some 900 or 550 sources are kept; with more in turn, each is forgotten before it comes again."""

OF_THE_EDIT = {"kind", "self_replace", "cross_replace", "amplify", "safety_checker"}
"""Settings that an inversion does not depend on."""

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Factor = Annotated[float, Field(allow_inf_nan=False)]


class NullTextSettings(LatentSettings):
    """Read: the captions `prompt.before` and `prompt.after`, which should share all the words they can.

    guidance_scale: of classifier-free guidance. steps: of the inversion and of the edit. inner_steps: Adam's on the
    embedding of no text at each of them, at most. self_replace, cross_replace: the share of steps, from the noisiest
    on, in which the edit takes over the source's self- and cross-attention maps; the more, the closer it stays to the
    photo. amplify: words or phrases of the caption `after` and the factor of their attention while cross-attention is
    replaced, as a mapping `{zombie: 2}` or pairs; negative ones push the word away.

    The paper chose self_replace from a range and one of two factors by looking at the edits. Appendix B.1 lost its
    numbers in the text we have; these defaults are the authors' repository's. attention_slicing has no effect: large
    attention maps are never built.
    """

    seeded: ClassVar[bool] = False
    kind: Literal["null-text"] = "null-text"
    model: str = Field(default="CompVis/stable-diffusion-v1-4", min_length=1)
    steps: int = Field(default=50, ge=1, le=500)
    guidance_scale: float = Field(default=7.5, gt=1)
    inner_steps: int = Field(default=10, ge=0)
    self_replace: float = Field(default=0.5, ge=0, le=1)
    cross_replace: float = Field(default=0.8, ge=0, le=1)
    amplify: tuple[tuple[Phrase, Factor], ...] = ()

    @field_validator("amplify", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        return tuple(given.items()) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _amplified_some_time(self) -> NullTextSettings:
        if self.amplify and not self._steps_of(self.cross_replace):
            raise ValueError("amplify has no effect without cross_replace")
        return self

    def replaced(self, step: int) -> tuple[bool, bool]:
        """Whether cross-attention and self-attention are replaced in a step, the noisiest being 0."""
        return step < self._steps_of(self.cross_replace), step < self._steps_of(self.self_replace)

    def _steps_of(self, share: float) -> int:
        return round(share * self.steps)


class NullTextFamily:
    """A loaded model. It draws no random numbers, so seeds make no difference.

    An inversion depends on source and caption `before` only, and costs up to eight times an edit: it is made once a
    source and kept for all concepts with that caption, also when the teacher is closed in between.

    Raises:
        UserError: see `load_latent_diffusion`.
    """

    def __init__(self, settings: NullTextSettings) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        from farm.editors.attention import ReplacingAttention
        from farm.editors.inversion import Denoiser
        from farm.editors.latent import load_latent_diffusion

        self._settings = settings
        self._model = load_latent_diffusion(StableDiffusionPipeline, settings)
        pipeline = self._model.pipeline
        pipeline.unet.requires_grad_(False)  # gradients go through it, to the embedding of no text
        pipeline.unet.set_attn_processor(ReplacingAttention())
        scheduler: Any = DDIMScheduler.from_config(  # type: ignore[no-untyped-call]
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading"
        )
        scheduler.set_timesteps(settings.steps, device=self._model.device)
        self._denoiser = Denoiser(pipeline.unet, scheduler, settings.guidance_scale)
        decides = {key: value for key, value in fingerprint(settings).items() if key not in OF_THE_EDIT}
        self._kept = _kept_inversions(json.dumps(decides, sort_keys=True))

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`.

        Raises:
            UserError: a caption is empty or too long, or an amplified word is not in the caption `after`.
        """
        from farm.editors.alignment import token_map

        before, after = prompt_text(prompt, "before"), prompt_text(prompt, "after")
        texts = self._model.embed(before), self._model.embed(after)
        tokens = token_map(self._model.pipeline.tokenizer, before, after, self._settings.amplify)
        inversions = [self._invert(image, before) for image in images]
        return self._model.finish(self._denoise(inversions, *texts, tokens))

    def _invert(self, image: Tensor, caption: str) -> Inversion:
        """Of one image `[3, h, w]`, alone: what it gives does not depend on a batch."""
        from farm.editors.inversion import invert

        def make() -> Inversion:
            latent = self._model.encode(image[None]).float()
            text, nothing = self._model.embed(caption), self._model.embed("")
            return invert(self._denoiser, latent, text, nothing, self._settings.inner_steps)

        content = hashlib.sha256(image.contiguous().numpy().data).hexdigest()
        return self._kept.get((content, tuple(image.shape), caption), make)

    def _denoise(self, inversions: Sequence[Inversion], before: Tensor, after: Tensor, tokens: TokenMap) -> Tensor:
        """The edits' latents `[n, 4, h, w]`. The sources go along for their attention, on the paths that are known."""
        import torch

        from farm.editors.attention import Replacement

        n, device = len(inversions), self._model.device
        tokens = tokens.to(device)
        path = torch.stack([inversion.path for inversion in inversions]).to(device)
        null = torch.stack([inversion.null for inversion in inversions]).to(device)
        before, after = before.expand(n, -1, -1), after.expand(n, -1, -1)
        latents = path[:, 0]
        for step, timestep in enumerate(self._denoiser.scheduler.timesteps):
            cross, self_attention = self._settings.replaced(step)
            taken = Replacement(cross=tokens if cross else None, self_attention=self_attention)
            batch, texts, options = [latents, latents], [null[:, step], after], {}
            if cross or self_attention:
                batch, texts = [path[:, step], *batch], [before, *texts]
                options = {"cross_attention_kwargs": {"replacement": taken}}
            with torch.no_grad():
                noise = self._denoiser.noise(torch.cat(batch), timestep, torch.cat(texts), **options)
                *_, free, text = noise.chunk(len(batch))
                latents = self._denoiser.step(latents, timestep, free, text)
        return latents


def open_editor(settings: NullTextSettings) -> DiffusionEditor:
    """Load the model and make the teacher ready.

    Raises:
        UserError: the model is not there, or of another family.
    """
    return DiffusionEditor(settings, NullTextFamily(settings))


@lru_cache(maxsize=1)
def _kept_inversions(decides: str) -> InversionCache:
    """What a process keeps while it opens and closes teachers. decides: all that an inversion depends on but the photo
    and its caption."""
    from farm.editors.inversion import InversionCache

    return InversionCache(KEPT_BYTES)
