"""The null-text teacher on tiny random weights, through diffusers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_diffusers import stable_diffusion
from tiny_null_text import MAN, STEPS, inverted, of_inversion, photos, settings_of, unet_batches
from torch import Tensor

from e2gan.pairs import Image
from farm.editors import attention, null_text
from farm.editors.alignment import TokenMap, token_map
from farm.editors.base import Failed, Prompt
from farm.editors.diffusion import fingerprint
from farm.editors.null_text import NullTextFamily, NullTextSettings, open_editor
from farm.errors import UserError

ZOMBIE, SAD = "a photo of a zombie", "a photo of a sad man in rain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    null_text._kept_inversions.cache_clear()


def prompt(after: str, before: str = MAN) -> Prompt:
    return Prompt(instruction="", before=before, after=after)


def levels(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# The edit


def test_with_one_caption_the_edit_is_the_reconstruction(folder: Path) -> None:
    family, images = NullTextFamily(settings_of(folder)), photos(2)
    edited, reasons = family.edit(images, prompt(MAN), [0, 0])
    known = torch.cat([inverted(family, image).path[-1:] for image in images])
    assert torch.allclose(edited, family._model.decode(known), atol=1e-3)
    assert reasons == [None, None]
    assert (edited[0] - edited[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("after", [ZOMBIE, SAD])
def test_all_replaced_the_edit_attends_as_its_source(folder: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    """The maps that denoising uses, layer by layer: self-attention's, and cross-attention's over the tokens of `a photo
    of a`, which both captions begin with, against those of the source alone on its path."""
    seen = record_maps(monkeypatch)
    gap = {}
    for share in (0, 1):
        family = NullTextFamily(settings_of(folder, self_replace=share, cross_replace=share))
        model, texts = family._denoiser, (family._model.embed(MAN), family._model.embed(after))
        tokens = token_map(family._model.pipeline.tokenizer, MAN, after)
        inversion = inverted(family, photos(1)[0])
        seen.clear()
        family._denoise([inversion], *texts, tokens)
        edits = [maps[-1] for maps in seen]
        seen.clear()
        with torch.no_grad():
            for latents, timestep in zip(inversion.path, model.scheduler.timesteps, strict=False):
                model.noise(latents[None], timestep, texts[0])
        sources = [maps[-1] for maps in seen]
        assert len(edits) == len(sources) == STEPS * len(model.unet.attn_processors)
        gap[share] = [
            (edit - source)[..., : 10 if edit.shape[-1] == 77 else None].abs().max()
            for edit, source in zip(edits, sources, strict=True)
        ]
    assert max(gap[1]) < 1e-5
    assert sum(found > 1e-4 for found in gap[0]) > 0.8 * len(gap[0])


def record_maps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Fills with the maps `[batch, heads, n, m]` that attention layers use from here on."""
    seen: list[Tensor] = []
    attend, mix = torch.nn.functional.scaled_dot_product_attention, attention.cross_maps

    def attending(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).detach())
        return attend(query, key, value, **options)

    def mixing(query: Tensor, key: Tensor, tokens: TokenMap) -> Tensor:
        maps = mix(query, key, tokens)
        seen.append(maps)
        return maps

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attending)
    monkeypatch.setattr(attention, "cross_maps", mixing)
    return seen


@pytest.mark.parametrize(
    ("cross", "self_attention", "thirds"), [(0, 0, 0), (0.5, 0.25, 2), (0.25, 0.5, 2), (1, 0, 4), (0, 1, 4)]
)
def test_attention_is_replaced_in_the_first_steps(
    folder: Path, cross: float, self_attention: float, thirds: int
) -> None:
    """A source goes through the UNet with its edit while something is taken from it."""
    family = NullTextFamily(settings_of(folder, cross_replace=cross, self_replace=self_attention))
    images = photos(2)
    family.edit(images, prompt(MAN), [0, 0])
    with unet_batches(family) as calls:
        family.edit(images, prompt(ZOMBIE), [0, 0])
    assert calls == [6] * thirds + [4] * (STEPS - thirds)
    assert [family._settings.replaced(step)[0] for step in range(STEPS)].count(True) == cross * STEPS
    assert [family._settings.replaced(step)[1] for step in range(STEPS)].count(True) == self_attention * STEPS


def test_each_kind_of_replacement_and_amplification_changes_the_edit(folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {"cross_replace": 0, "self_replace": 0},
        {"cross_replace": 0, "self_replace": 1},
        {"cross_replace": 1, "self_replace": 0},
        {"cross_replace": 1, "self_replace": 0, "amplify": {"zombie": 3}},
        {"cross_replace": 1, "self_replace": 0, "amplify": {"zombie": 1}},
    ]
    edits = []
    for option in options:
        edited, _ = NullTextFamily(settings_of(folder, **option)).edit(photos(1), prompt(ZOMBIE), [0])
        edits.append(edited)
    same = [(i, j) for i in range(5) for j in range(i) if torch.allclose(edits[i], edits[j], atol=1e-4)]
    assert same == [(4, 2)]


# What is done once


def test_concepts_share_a_sources_inversion(folder: Path) -> None:
    family, images = NullTextFamily(settings_of(folder)), photos(2)
    with unet_batches(family) as first:
        family.edit(images, prompt(ZOMBIE), [0, 1])
    with unet_batches(family) as second:
        family.edit(images.flip(0), prompt(SAD), [0, 1])
    assert len(first) == 2 * of_inversion() + STEPS
    assert len(second) == STEPS
    with unet_batches(family) as third:
        family.edit(images[:1], prompt(ZOMBIE, before="a face"), [0])
    assert len(third) == of_inversion() + STEPS


def test_an_inversion_outlives_its_teacher(folder: Path, tmp_path: Path) -> None:
    images = photos(1)
    NullTextFamily(settings_of(folder)).edit(images, prompt(ZOMBIE), [0])
    again = NullTextFamily(settings_of(folder, self_replace=1, amplify={"zombie": 2}))
    with unet_batches(again) as calls:
        again.edit(images, prompt(ZOMBIE), [0])
    assert len(calls) == STEPS
    others = [settings_of(folder, guidance_scale=3), settings_of(stable_diffusion(tmp_path / "other", seed=9))]
    for other in map(NullTextFamily, others):
        with unet_batches(other) as calls:
            other.edit(images, prompt(ZOMBIE), [0])
        assert len(calls) == of_inversion() + STEPS


def test_kept_or_made_anew_the_edit_is_the_same(folder: Path) -> None:
    edits = []
    family = NullTextFamily(settings_of(folder))
    for _ in range(2):
        edits.append(family.edit(photos(1), prompt(ZOMBIE), [0])[0])
    null_text._kept_inversions.cache_clear()
    edits.append(NullTextFamily(settings_of(folder)).edit(photos(1), prompt(ZOMBIE), [99])[0])
    assert torch.equal(edits[0], edits[1])
    assert torch.equal(edits[0], edits[2])


# As a teacher


def test_photos_of_several_sizes_through_the_editor(folder: Path) -> None:
    editor = open_editor(settings_of(folder, batch_size=2))
    images = [levels(64, 64, 0), levels(48, 72, 1), levels(64, 64, 2)]
    edited = editor.edit(images, prompt(ZOMBIE), [1, 2, 3])
    alone = [editor.edit([image], prompt(ZOMBIE), [7])[0] for image in images]
    for image, one, other in zip(images, edited, alone, strict=True):
        assert not isinstance(one, Failed)
        assert not isinstance(other, Failed)
        assert one.shape == image.shape
        assert one.dtype == np.uint8
        assert np.abs(one.astype(int) - other).max() <= 1
        assert one.std() > 0


def test_the_safety_checker_has_its_say(tmp_path: Path) -> None:
    model = stable_diffusion(tmp_path / "checked", safety_checker=True, flags=True)
    settings = settings_of(model, inner_steps=0).model_copy(update={"safety_checker": True})
    assert open_editor(settings).edit([levels(64, 64)], prompt(ZOMBIE), [0]) == [
        Failed("the safety checker blanked it")
    ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (prompt(""), "caption 'after' is empty"),
        (prompt(ZOMBIE, before=" "), "caption 'before' is empty"),
        (prompt("zombie " * 20), "tokens and .* reads 77"),
        (prompt(ZOMBIE, before="man " * 40), "tokens and .* reads 77"),
        (prompt(MAN), "editor.amplify: 'zombie' is not in the caption 'a photo of a man'"),
    ],
)
def test_prompts_it_cannot_use_are_refused(folder: Path, wrong: Prompt, says: str) -> None:
    family = NullTextFamily(settings_of(folder, amplify={"zombie": 2}))
    with unet_batches(family) as calls, pytest.raises(UserError, match=says) as caught:
        family.edit(photos(1), wrong, [0])
    assert not calls
    assert "\n" not in str(caught.value)


def test_settings() -> None:
    given = NullTextSettings.model_validate({"kind": "null-text", "amplify": {" zombie ": 2, "blood": -1}})
    assert not given.seeded
    assert given.model == "CompVis/stable-diffusion-v1-4"
    assert given.amplify == (("zombie", 2.0), ("blood", -1.0))
    assert NullTextSettings.model_validate(given.model_dump(mode="json")) == given
    assert hash(given) == hash(NullTextSettings(amplify=[["zombie", 2], ["blood", -1]]))
    steps = [given.replaced(step) for step in range(50)]
    assert steps == [(True, True)] * 25 + [(True, False)] * 15 + [(False, False)] * 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"amplify": {"zombie": 2}, "cross_replace": 0},
        {"amplify": {"zombie": float("nan")}},
        {"amplify": {" ": 2}},
        {"amplify": "zombie"},
        {"guidance_scale": 1},
        {"self_replace": 1.1},
        {"steps": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NullTextSettings.model_validate(wrong)


def test_what_changes_an_edit_is_in_the_fingerprint(folder: Path) -> None:
    plain = fingerprint(settings_of(folder))
    assert plain == fingerprint(settings_of(folder, batch_size=3))
    for change in ({"self_replace": 0.1}, {"cross_replace": 0.1}, {"amplify": {"a": 2}}, {"inner_steps": 3}):
        assert plain != fingerprint(settings_of(folder, **change))
