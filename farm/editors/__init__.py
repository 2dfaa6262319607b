"""Teachers: one file a family, one `Editor` protocol. `docs/teachers.md` says how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, get_args

from pydantic import Field

from farm.editors import (
    controlnet,
    diffusion,
    flux_kontext,
    instruct_diffusion,
    instruct_pix2pix,
    null_text,
    onnx,
    procedural,
    qwen_image_edit,
    stable_diffusion,
    stable_diffusion_xl,
)
from farm.editors.base import Editor, Failed, Prompt, edit_seed
from farm.editors.controlnet import ControlNetSettings
from farm.editors.flux_kontext import FluxKontextSettings
from farm.editors.instruct_diffusion import InstructDiffusionSettings
from farm.editors.instruct_pix2pix import InstructPix2PixSettings
from farm.editors.null_text import NullTextSettings
from farm.editors.onnx import OnnxSettings
from farm.editors.procedural import ProceduralSettings
from farm.editors.qwen_image_edit import QwenImageEditSettings
from farm.editors.stable_diffusion import StableDiffusionSettings
from farm.editors.stable_diffusion_xl import StableDiffusionXLSettings
from farm.errors import UserError

__all__ = [
    "KINDS",
    "ControlNetSettings",
    "Editor",
    "EditorSettings",
    "Failed",
    "FluxKontextSettings",
    "InstructDiffusionSettings",
    "InstructPix2PixSettings",
    "NullTextSettings",
    "OnnxSettings",
    "ProceduralSettings",
    "Prompt",
    "QwenImageEditSettings",
    "StableDiffusionSettings",
    "StableDiffusionXLSettings",
    "edit_seed",
    "editor_fingerprint",
    "open_editor",
]

_Settings = (
    ProceduralSettings
    | OnnxSettings
    | StableDiffusionSettings
    | StableDiffusionXLSettings
    | InstructPix2PixSettings
    | ControlNetSettings
    | NullTextSettings
    | InstructDiffusionSettings
    | FluxKontextSettings
    | QwenImageEditSettings
)

EditorSettings = Annotated[_Settings, Field(discriminator="kind")]
"""The settings of a teacher: `kind` says which family's."""

KINDS: tuple[str, ...] = tuple(settings.model_fields["kind"].default for settings in get_args(_Settings))
"""Every family's `kind`."""


def open_editor(settings: EditorSettings, concept_id: str, fingerprint: Mapping[str, Any] | None = None) -> Editor:
    """Make the teacher of a concept ready.

    fingerprint: what `editor_fingerprint` said; hub ids are then loaded at the commits it found.

    Raises:
        UserError: the settings name a style or a model that is not there, or a model of another family.
    """
    if isinstance(settings, diffusion.DiffusionSettings):
        if find_spec("diffusers") is None:
            raise UserError(f"editor.kind: {settings.kind} needs diffusers: pip install 'e2gan-farm[diffusion]'.")
        if fingerprint is not None:
            settings = diffusion.pinned(settings, fingerprint)
    match settings:
        case ProceduralSettings():
            return procedural.ProceduralEditor(settings, concept_id)
        case OnnxSettings():
            return onnx.OnnxEditor(settings)
        case StableDiffusionSettings():
            return stable_diffusion.open_editor(settings)
        case StableDiffusionXLSettings():
            return stable_diffusion_xl.open_editor(settings)
        case InstructPix2PixSettings():
            return instruct_pix2pix.open_editor(settings)
        case ControlNetSettings():
            return controlnet.open_editor(settings)
        case NullTextSettings():
            return null_text.open_editor(settings)
        case InstructDiffusionSettings():
            return instruct_diffusion.open_editor(settings)
        case FluxKontextSettings():
            return flux_kontext.open_editor(settings)
        case QwenImageEditSettings():
            return qwen_image_edit.open_editor(settings)


def editor_fingerprint(settings: EditorSettings, concept_id: str) -> dict[str, Any]:
    """What a teacher's edits depend on besides images, prompt and seeds, as JSON: part of the edits' digest.

    Raises:
        UserError: the settings name a style or a model that is not there.
    """
    match settings:
        case ProceduralSettings():
            return procedural.fingerprint(settings, concept_id)
        case OnnxSettings():
            return onnx.fingerprint(settings)
        case ControlNetSettings():
            return controlnet.fingerprint(settings)
        case _:
            return diffusion.fingerprint(settings)
