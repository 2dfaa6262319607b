"""What licence a teacher's weights are under, as far as that is known: an adapter inherits the question.

By the model cards of the hub in 2026. A model that is not listed, a folder above all, is the user's own affair: its
licence is `unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Licence:
    """id: as the hub spells it, `other` for one it has no id for, whose `name` and `link` then say more."""

    id: str
    name: str | None = None
    link: str | None = None


UNKNOWN = Licence(id="unknown")
OWN = Licence(id="apache-2.0")
"""Of what comes with this package."""

_OPENRAIL_M = Licence(id="creativeml-openrail-m")
_FLUX_DEV = Licence(
    id="other",
    name="flux-1-dev-non-commercial-license",
    link="https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev/blob/main/LICENSE.md",
)

LICENCES: Mapping[str, Licence] = {
    "CompVis/stable-diffusion-v1-4": _OPENRAIL_M,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _OPENRAIL_M,
    "stabilityai/stable-diffusion-xl-base-1.0": Licence(id="openrail++"),
    "timbrooks/instruct-pix2pix": Licence(id="mit"),
    "lllyasviel/sd-controlnet-normal": Licence(id="openrail"),
    "Intel/dpt-hybrid-midas": Licence(id="apache-2.0"),
    "black-forest-labs/FLUX.1-Kontext-dev": _FLUX_DEV,
    "Qwen/Qwen-Image-Edit": Licence(id="apache-2.0"),
    "Qwen/Qwen-Image-Edit-2509": Licence(id="apache-2.0"),
    "Qwen/Qwen-Image-Edit-2511": Licence(id="apache-2.0"),
}
"""By hub id."""


def licences_of(fingerprint: Mapping[str, Any]) -> dict[str, Licence]:
    """The licence of everything a teacher is made of, by what people call it.

    fingerprint: see `farm.editors.editor_fingerprint`. It names hub ids, and knows a folder by its content alone.
    """
    if fingerprint["kind"] == "procedural":
        return {f"the filter `{fingerprint['style']}` of this package": OWN}
    hub = [value["id"] for value in fingerprint.values() if isinstance(value, Mapping) and "id" in value]
    found = {f"`{name}`": LICENCES.get(name, UNKNOWN) for name in hub}
    if "sha256" in fingerprint or any(isinstance(v, Mapping) and "sha256" in v for v in fingerprint.values()):
        found["weights from a folder of whoever ran the farm"] = UNKNOWN
    return found
