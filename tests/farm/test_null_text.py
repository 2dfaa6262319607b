"""The null-text teacher on tiny random weights, through diffusers' own classes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_diffusers import stable_diffusion
from torch import Tensor

from e2gan.pairs import Image
from farm.editors import attention, null_text
from farm.editors.alignment import TokenMap, token_map
from farm.editors.base import Failed, Prompt
from farm.editors.diffusion import fingerprint
from farm.editors.inversion import Denoiser, Inversion, InversionCache, ddim_inversion, invert
from farm.editors.null_text import NullTextFamily, NullTextSettings, open_editor
from farm.errors import UserError

MAN, ZOMBIE, SAD = "a photo of a man", "a photo of a zombie", "a photo of a sad man in rain"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    null_text._kept_inversions.cache_clear()


def settings_of(folder: Path, **options: Any) -> NullTextSettings:
    given = {"steps": STEPS, "inner_steps": 2, "dtype": "float32", "device": "cpu", "side": 64}
    return NullTextSettings(model=str(folder), safety_checker=False, **{**given, **options})


def prompt(after: str, before: str = MAN) -> Prompt:
    return Prompt(instruction="", before=before, after=after)


def photos(n: int, *, seed: int = 0, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def levels(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@contextmanager
def unet_batches(family: NullTextFamily) -> Iterator[list[int]]:
    """The batch size of every call of the UNet."""
    seen: list[int] = []
    hook = family._denoiser.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    yield seen
    hook.remove()


def of_inversion(steps: int = STEPS, inner_steps: int = 2) -> int:
    """UNet calls of an inversion that never ends a step early: there, and back under both embeddings."""
    return steps + steps * (1 + inner_steps + 1)


def inverted(family: NullTextFamily, image: Tensor, caption: str = MAN, inner_steps: int = 2) -> Inversion:
    model = family._model
    latent, text, nothing = model.encode(image[None]).float(), model.embed(caption), model.embed("")
    return invert(family._denoiser, latent, text, nothing, inner_steps)


def constant_unet(family: NullTextFamily) -> Tensor:
    """Make the UNet say the same noise `[4]` whatever it is given."""
    last = family._denoiser.unet.conv_out
    last.weight.data.zero_()
    last.bias.data.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    return last.bias.data


# Inversion


def test_inversion_follows_ddims_closed_form(folder: Path) -> None:
    """Song et al. 2021, equation 13: with constant noise e, x/sqrt(a) - e*sqrt(1/a - 1) never changes."""
    family = NullTextFamily(settings_of(folder))
    scheduler, noise = family._denoiser.scheduler, constant_unet(family).view(1, 4, 1, 1)
    latent = family._model.encode(photos(1)).float()
    levels = ddim_inversion(family._denoiser, latent, family._model.embed(MAN))
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]  # Stable Diffusion's, with its offset of 1
    alphas = scheduler.alphas_cumprod[[0, 1, 251, 501, 751]]
    clean = latent / alphas[0].sqrt() - noise * (1 / alphas[0] - 1).sqrt()
    for alpha, found in zip(alphas, levels, strict=True):
        assert torch.allclose(found, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, atol=1e-5)


def test_a_path_that_leads_back_is_not_optimised(folder: Path) -> None:
    """Where denoising undoes the inversion, the embedding of no text stays as it is and no time is spent on it."""
    family = NullTextFamily(settings_of(folder))
    constant_unet(family)
    latent = family._model.encode(photos(1)).float()
    with unet_batches(family) as calls:
        inversion = inverted(family, photos(1)[0], inner_steps=10)
    assert torch.allclose(inversion.path[-1:], latent, atol=1e-5)
    assert torch.equal(inversion.null, family._model.embed("").expand(STEPS, -1, -1))
    assert len(calls) == of_inversion(inner_steps=0)


def test_optimised_embeddings_lead_back_to_the_photo(folder: Path) -> None:
    family, image = NullTextFamily(settings_of(folder)), photos(1)[0]
    latent = family._model.encode(image[None]).float()
    error = {n: (inverted(family, image, inner_steps=n).path[-1:] - latent).square().mean() for n in (0, 10, 40)}
    assert error[10] < 0.9 * error[0]
    assert error[40] < 0.5 * error[0]


def test_inversion_is_the_papers_algorithm(folder: Path) -> None:
    """Mokady et al. 2022, algorithm 1, written out with DDIM's and Adam's formulas."""
    family, image = NullTextFamily(settings_of(folder)), photos(1)[0]
    model, text, null = family._denoiser, family._model.embed(MAN), family._model.embed("")
    pivots = ddim_inversion(model, family._model.encode(image[None]).float(), text)
    alphas = model.scheduler.alphas_cumprod[[751, 501, 251, 1, 0]]
    found, latent = inverted(family, image, inner_steps=2), pivots[-1]
    for step, timestep in enumerate(model.scheduler.timesteps):
        told = model.unet(latent, timestep, text).sample.detach()

        def back(null: Tensor, latent: Tensor = latent, told: Tensor = told, step: int = step) -> Tensor:
            free = model.unet(latent, int(model.scheduler.timesteps[step]), null).sample
            noise, (now, then) = 7.5 * told - 6.5 * free, alphas[step : step + 2]
            return (latent - (1 - now).sqrt() * noise) * (then / now).sqrt() + (1 - then).sqrt() * noise

        rate, moments = 0.01 * (1 - step / STEPS / 2), (torch.zeros_like(null), torch.zeros_like(null))
        for n in (1, 2):
            null.requires_grad_()
            (slope,) = torch.autograd.grad((back(null) - pivots[-2 - step]).square().mean(), null)
            moments = 0.9 * moments[0] + 0.1 * slope, 0.999 * moments[1] + 0.001 * slope**2
            first, second = moments[0] / (1 - 0.9**n), moments[1] / (1 - 0.999**n)
            null = (null - rate * first / (second.sqrt() + 1e-8)).detach()
        latent = back(null).detach()
        assert torch.allclose(found.null[step], null[0], atol=1e-4)
        assert torch.allclose(found.path[step + 1], latent[0], atol=1e-3)


def test_an_inversion_leaves_no_graph(folder: Path) -> None:
    family = NullTextFamily(settings_of(folder))
    inversion = inverted(family, photos(1)[0])
    gc.collect()
    graphs = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.grad_fn is not None]
    assert not graphs
    assert not inversion.path.requires_grad
    assert not inversion.null.requires_grad
    assert all(weight.grad is None and not weight.requires_grad for weight in family._denoiser.unet.parameters())
    assert inversion.nbytes == 4 * ((STEPS + 1) * 4 * 8 * 8 + STEPS * 77 * 32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_is_optimised_in_single(folder: Path, dtype: str) -> None:
    """The gradient of a mean over a photo's latents is below what float16 can tell from zero."""
    exact = NullTextFamily(settings_of(folder))
    half = NullTextFamily(settings_of(folder, dtype=dtype))
    image, nothing = photos(1)[0], exact._model.embed("")
    found, expected = inverted(half, image), inverted(exact, image)
    assert found.null.dtype == half._denoiser.unet.dtype
    assert found.path.dtype == torch.float32
    moved, wanted = found.null.float() - nothing, expected.null - nothing
    assert (moved.sign() == wanted.sign())[wanted.abs() > 1e-3].float().mean() > 0.85
    latent = half._model.encode(image[None]).float()
    unhelped = inverted(half, image, inner_steps=0)
    helped = inverted(half, image, inner_steps=20)
    assert (helped.path[-1:] - latent).square().mean() < 0.7 * (unhelped.path[-1:] - latent).square().mean()


def test_the_cache_forgets_what_was_used_least_lately() -> None:
    def make(key: str) -> Inversion:
        made.append(key)
        return Inversion(torch.zeros(10), torch.zeros(15))  # 100 bytes

    cache, made, known = InversionCache(250), list[str](), list[str]()
    for key in "abacabbcdda":
        cache.get(key, lambda key=key: make(key))
        assert made[-1:] == [key] or key in known[-2:]
        known = [*(other for other in known if other != key), key]
    assert made == list("abcbcda")
    small, before = InversionCache(1), len(made)
    for _ in range(3):
        small.get("a", lambda: make("a"))  # one is always kept
    assert len(made) == before + 1


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


def test_guidance_is_the_papers(folder: Path) -> None:
    """Classifier-free guidance of scale 1 is the caption's noise alone."""
    family = NullTextFamily(settings_of(folder))
    model = Denoiser(family._denoiser.unet, family._denoiser.scheduler, 1)
    latents, free, text = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    timestep = model.scheduler.timesteps[1]
    assert torch.allclose(
        model.step(latents, timestep, free, text), model.scheduler.step(text, timestep, latents).prev_sample, atol=1e-5
    )
