"""What the flow transformers FLUX.1 Kontext and Qwen-Image-Edit share."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from farm.editors.weights import locate
from farm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from farm.editors.diffusion import DiffusionSettings


def check_pipeline(kind: Any, settings: DiffusionSettings, name: str) -> None:
    """Refuse a model that was saved for another pipeline than `kind`: sister models have parts of the same classes.

    name: a hub id that would do, for the error. What else is wrong with a folder is told by `load_pipeline`.

    Raises:
        UserError: the model is another pipeline's, or not on this machine.
    """
    folder = locate(settings.model, settings.revision, settings.download, variant=settings.variant).folder
    with suppress(OSError):
        made_for = kind.load_config(folder)["_class_name"]
        if made_for != kind.__name__:
            raise UserError(
                f"editor.model: {settings.model} is a {made_for}, but editor.kind wants a {kind.__name__}; name a "
                f"model that is one, such as {name}, or the editor.kind of that one."
            )


def packable(images: Tensor, pipeline: Any) -> Tensor:
    """Images `[n, 3, h, w]` reflected at bottom and right until 2x2 latents can be packed: 16 divides their sides."""
    from torch.nn.functional import pad

    multiple = 2 * pipeline.vae_scale_factor
    height, width = images.shape[2:]
    return pad(images, (0, -width % multiple, 0, -height % multiple), mode="reflect")
