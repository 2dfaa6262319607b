"""Teachers: one file a family, one `Editor` protocol."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from farm.editors import onnx, procedural
from farm.editors.base import Editor, source_seed
from farm.editors.onnx import OnnxSettings
from farm.editors.procedural import ProceduralSettings

__all__ = [
    "Editor",
    "EditorSettings",
    "OnnxSettings",
    "ProceduralSettings",
    "editor_fingerprint",
    "open_editor",
    "source_seed",
]

EditorSettings = Annotated[ProceduralSettings | OnnxSettings, Field(discriminator="kind")]
"""The `editor` section of a farm's configuration: `kind` says which family's settings these are."""


def open_editor(settings: EditorSettings, concept_id: str) -> Editor:
    """Make the teacher of a concept ready.

    Raises:
        UserError: the settings name a style or a model that is not there.
    """
    match settings:
        case ProceduralSettings():
            return procedural.ProceduralEditor(settings, concept_id)
        case OnnxSettings():
            return onnx.OnnxEditor(settings)


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
