"""ControlNet on normal maps (Zhang & Agrawala 2023): Stable Diffusion paints a caption onto the photo's surfaces.

One of the teachers of E2GAN's appendix B.1. By diffusers' StableDiffusionControlNetPipeline, sampled by DDIM as in the
authors' demo `gradio_normal2image.py` (repository lllyasviel/ControlNet). Of the photo the model sees the normal map
alone, see `farm.editors.normal_map`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from farm.editors import diffusion
from farm.editors.base import Prompt
from farm.editors.diffusion import DiffusionEditor, LatentSettings, generators, prompt_text
from farm.editors.loading import quieten, without_deprecations
from farm.editors.weights import locate, variant_of, weights_fingerprint
from farm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

AS_IN_THE_UNET = ("in_channels", "block_out_channels", "cross_attention_dim")
"""What of a ControlNet's configuration must be that of the UNet it steers, whose encoder it is a copy of."""

UNUSED_BY_DPT = "neck.fusion_stage.layers.0.residual_layer1."
"""Tensors that the class has and no forward pass reads; the published weights are without them."""


class ControlNetSettings(LatentSettings):
    """Read: the caption `prompt.after`.

    controlnet: the normal-map ControlNet for `model`, a folder or a hub id, and its revision. depth_model: the depth
    network, a DPT, that normals are made with, and its revision; how steep a surface looks depends on it, see
    `farm.editors.normal_map`. The default one's revision is the hub's conversion to safetensors, which its main branch
    has not had. `variant` and `download` hold for these two as well.
    control_strength: what the ControlNet's outputs are multiplied by; 0 is plain text to image.
    normal_background_threshold: what is further away than this share of the depth's range, 0 the furthest, is flat.
    guidance_scale: of classifier-free guidance; 1 is none. negative_prompt: what guidance leads away from.

    Appendix B.1's numbers are lost in the text we have: these are the authors' demo's, without the words that it adds
    to prompts.
    """

    kind: Literal["controlnet"] = "controlnet"
    model: str = Field(default="stable-diffusion-v1-5/stable-diffusion-v1-5", min_length=1)
    controlnet: str = Field(default="lllyasviel/sd-controlnet-normal", min_length=1)
    controlnet_revision: str | None = None
    depth_model: str = Field(default="Intel/dpt-hybrid-midas", min_length=1)
    depth_revision: str | None = None
    control_strength: float = Field(default=1.0, ge=0, le=2)
    normal_background_threshold: float = Field(default=0.4, ge=0, le=1)
    guidance_scale: float = Field(default=9.0, ge=1)
    steps: int = Field(default=20, ge=1, le=1000)
    negative_prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _depth_revision(cls, given: Any) -> Any:
        if isinstance(given, dict) and "depth_model" not in given:
            return {"depth_revision": "refs/pr/5", **given}
        return given

    @model_validator(mode="after")
    def _one_device(self) -> ControlNetSettings:
        if self.device == "balanced":
            raise ValueError("device: balanced spreads one pipeline's models, and a ControlNet is loaded beside it")
        return self


class ControlNetFamily:
    """A loaded model, its ControlNet and the preprocessor.

    Raises:
        UserError: see `load_latent_diffusion`; or the ControlNet or the depth network is not there, is something else,
            or does not fit the model.
    """

    def __init__(self, settings: ControlNetSettings) -> None:
        import torch
        from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

        from farm.editors.latent import load_latent_diffusion

        self._settings = settings
        dtype = getattr(torch, settings.dtype)
        where = settings.controlnet, settings.controlnet_revision
        _, controlnet = _load(ControlNetModel, *where, settings, key="editor.controlnet", torch_dtype=dtype)
        self._maps = _load_normal_maps(settings)
        self._model = load_latent_diffusion(StableDiffusionControlNetPipeline, settings, controlnet=controlnet)
        pipeline = self._model.pipeline
        for name in AS_IN_THE_UNET:
            has, wants = controlnet.config[name], pipeline.unet.config[name]
            if has != wants:
                raise UserError(
                    f"editor.controlnet: {settings.controlnet} was made for another model than {settings.model} (its "
                    f"{name} is {has}, not {wants}); name a ControlNet for this one."
                )
        ddim: Any = DDIMScheduler
        # As the authors' DDIM has it; a folder's own scheduler, such as PNDM, may not say these.
        pipeline.scheduler = ddim.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)

    def edit(self, images: Tensor, prompt: Prompt, seeds: Sequence[int]) -> tuple[Tensor, list[str | None]]:
        """See `Family.edit`."""
        latents = self._model.pipeline(
            prompt_embeds=self._model.embed(prompt_text(prompt, "after")).expand(len(images), -1, -1),
            negative_prompt_embeds=self._model.embed(self._settings.negative_prompt).expand(len(images), -1, -1),
            image=self._maps.of(images, self._model.device),
            controlnet_conditioning_scale=self._settings.control_strength,
            guidance_scale=self._settings.guidance_scale,
            num_inference_steps=self._settings.steps,
            generator=generators(seeds),
            output_type="latent",
        ).images
        return self._model.finish(latents)


def open_editor(settings: ControlNetSettings) -> DiffusionEditor:
    """Load the models and make the teacher ready.

    Raises:
        UserError: a model is not there, or of another family.
    """
    return DiffusionEditor(settings, ControlNetFamily(settings))


def fingerprint(settings: ControlNetSettings) -> dict[str, Any]:
    """As `farm.editors.diffusion.fingerprint`, with the weights of all three models.

    Raises:
        UserError: weights are not there.
    """
    found = diffusion.fingerprint(settings)
    for key, revision in (("controlnet", "controlnet_revision"), ("depth_model", "depth_revision")):
        model = found[key], found.pop(revision)
        found[key] = weights_fingerprint(*model, settings.download, key=f"editor.{key}")
    return found


def _load_normal_maps(settings: ControlNetSettings) -> Any:
    """The preprocessor, a `NormalMaps`."""
    import torch
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    from farm.editors.normal_map import NormalMaps

    key, where = "editor.depth_model", (settings.depth_model, settings.depth_revision)
    # In float32 whatever the rest is in: the slopes of a depth of thousands are lost in the steps of half precision.
    folder, estimator = _load(DPTForDepthEstimation, *where, settings, key=key, dtype=torch.float32)
    try:
        processor = DPTImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {settings.depth_model} has no usable preprocessor_config.json in {folder}; name a folder or hub "
            "id that holds all of a depth network."
        ) from error
    return NormalMaps(estimator.eval(), processor, settings.normal_background_threshold)


def _load(
    kind: Any, model: str, revision: str | None, settings: ControlNetSettings, *, key: str, **options: Any
) -> tuple[Path, Any]:
    """The folder of a single model and the model, of class `kind`, with all its tensors."""
    folder = locate(model, revision, settings.download, variant=settings.variant, key=key).folder
    marks = {variant_of(path.name) for path in folder.glob("*.safetensors")}
    if not marks:
        raise UserError(f"{key}: {model} has no weights as safetensors in {folder}; name a folder or hub id that has.")
    quieten()
    try:
        with without_deprecations():
            loaded, found = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                variant=settings.variant if settings.variant in marks else None,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # what the two libraries raise on a damaged folder has no common base
        problem = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]
        raise UserError(f"{key}: {model} cannot be loaded as a {kind.__name__} ({problem}); name one.") from error
    absent = sorted(name for name in found["missing_keys"] if not name.startswith(UNUSED_BY_DPT))
    if absent:
        some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise UserError(
            f"{key}: {model} is no whole {kind.__name__}: it lacks {len(absent)} tensors ({some}); name one."
        )
    return folder, loaded
