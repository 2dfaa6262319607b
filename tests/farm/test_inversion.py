"""Null-text inversion on tiny random weights, held against the papers' formulas."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny_diffusers import stable_diffusion
from tiny_null_text import MAN, STEPS, inverted, of_inversion, photos, settings_of, unet_batches
from torch import Tensor

from farm.editors.inversion import Denoiser, Inversion, InversionCache, ddim_inversion
from farm.editors.null_text import NullTextFamily


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


def constant_unet(family: NullTextFamily) -> Tensor:
    """Make the UNet say the same noise `[4]` whatever it is given."""
    last = family._denoiser.unet.conv_out
    last.weight.data.zero_()
    last.bias.data.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    return last.bias.data


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
        # Where a slope is zero but for rounding, Adam's first step is its sign, and threads add up in another order.
        assert torch.isclose(found.null[step], null[0], atol=1e-4).float().mean() > 0.999
        assert torch.allclose(found.path[step + 1], latent[0], atol=1e-3)


def test_an_inversion_leaves_no_graph(folder: Path) -> None:
    def graphs() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) and thing.grad_fn is not None for thing in gc.get_objects())

    family = NullTextFamily(settings_of(folder))
    before = graphs()  # of other tests
    inversion = inverted(family, photos(1)[0])
    assert graphs() <= before
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


def test_guidance_is_the_papers(folder: Path) -> None:
    """Classifier-free guidance of scale 1 is the caption's noise alone."""
    family = NullTextFamily(settings_of(folder))
    model = Denoiser(family._denoiser.unet, family._denoiser.scheduler, 1)
    latents, free, text = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    timestep = model.scheduler.timesteps[1]
    assert torch.allclose(
        model.step(latents, timestep, free, text), model.scheduler.step(text, timestep, latents).prev_sample, atol=1e-5
    )
