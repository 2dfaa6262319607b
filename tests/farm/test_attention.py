"""Attention replacement, held against maps that are recovered from what an attention layer gives out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_diffusers import TEXT_WIDTH, unet
from torch import Tensor

from farm.editors import attention
from farm.editors.alignment import TokenMap
from farm.editors.attention import Replacement, ReplacingAttention

PIXELS, TOKENS, WIDTH = 9, 7, 16


def layer(*, cross: bool, heads: int = 1, seed: int = 0) -> Any:
    """A diffusers attention layer with biases, in double precision."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(seed)
    attn = Attention(
        query_dim=WIDTH,
        cross_attention_dim=WIDTH if cross else None,
        heads=heads,
        dim_head=WIDTH // heads,
        bias=True,
        processor=ReplacingAttention(),
    )
    return attn.double().eval()


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maps_used(attn: Any, pixels: Tensor, context: Tensor, output: Tensor) -> Tensor:
    """The attention maps `[n, pixels, context]` of a layer of one head, solved for from its output, which is
    `maps @ values` behind a linear layer."""
    projection = attn.to_out[0]
    mixed = torch.linalg.solve(projection.weight, (output - projection.bias).mT).mT
    return mixed @ torch.linalg.pinv(attn.to_v(context))


def plain_maps(attn: Any, pixels: Tensor, context: Tensor) -> Tensor:
    """By diffusers' own code."""
    return attn.get_attention_scores(attn.to_q(pixels), attn.to_k(context))


def token_map(seed: int = 5) -> TokenMap:
    generator = torch.Generator().manual_seed(seed)
    return TokenMap(torch.rand(TOKENS, TOKENS, generator=generator), torch.rand(TOKENS, generator=generator))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 3))
@torch.no_grad()
def test_self_attention_of_edits_is_their_sources(seed: int, n: int) -> None:
    attn, pixels = layer(cross=False, seed=seed), noise(3 * n, PIXELS, WIDTH, seed=seed)
    output = attn(pixels, replacement=Replacement(cross=None, self_attention=True))
    source, free, _ = plain_maps(attn, pixels, pixels).chunk(3)
    used = maps_used(attn, pixels, pixels, output)
    assert torch.allclose(used, torch.cat([source, free, source]), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 3))
@torch.no_grad()
def test_cross_attention_of_edits_is_mixed_as_the_tokens_say(seed: int, n: int) -> None:
    attn, tokens = layer(cross=True, seed=seed), token_map(seed)
    pixels, text = noise(3 * n, PIXELS, WIDTH, seed=seed), noise(3 * n, TOKENS, WIDTH, seed=seed + 1)
    output = attn(pixels, text, replacement=Replacement(cross=tokens, self_attention=False))
    source, free, edit = plain_maps(attn, pixels, text).chunk(3)
    mixed = edit.clone()
    for j in range(TOKENS):
        mixed[..., j] = edit[..., j] * tokens.from_own[j]
        for i in range(TOKENS):
            mixed[..., j] += source[..., i] * tokens.from_source[i, j]
    used = maps_used(attn, pixels, text, output)
    assert torch.allclose(used, torch.cat([source, free, mixed]), atol=1e-5)


@torch.no_grad()
def test_each_head_has_its_own_maps() -> None:
    """A layer of two heads gives what two layers of one head do together."""
    both = layer(cross=True, heads=2)
    pixels, text = noise(3, PIXELS, WIDTH, seed=1), noise(3, TOKENS, WIDTH, seed=2)
    taken = Replacement(cross=token_map(), self_attention=True)
    half, total = WIDTH // 2, both.to_out[0].bias.expand(3, PIXELS, WIDTH)
    for head in (slice(0, half), slice(half, WIDTH)):
        query, key, value = (
            linear(states)[..., head] for linear, states in ((both.to_q, pixels), (both.to_k, text), (both.to_v, text))
        )
        source, free, edit = torch.softmax(query @ key.mT / half**0.5, dim=-1).chunk(3)
        edit = source @ taken.cross.from_source.double() + edit * taken.cross.from_own
        total = total + torch.cat([source, free, edit]) @ value @ both.to_out[0].weight[:, head].T
    assert torch.allclose(both(pixels, text, replacement=taken), total, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 33])
def test_only_coarse_layers_replace_self_attention(side: int) -> None:
    attn, pixels = layer(cross=False), noise(3, side**2, WIDTH, seed=3)
    plain, replaced = attn(pixels), attn(pixels, replacement=Replacement(cross=None, self_attention=True))
    assert torch.allclose(replaced[:2], plain[:2])
    assert torch.allclose(replaced[2], plain[2]) == (side**2 > attention.SELF_REPLACE_PIXELS)


@torch.no_grad()
@pytest.mark.parametrize(("cross", "self_attention"), [(False, True), (True, False)])
def test_one_kind_alone(cross: bool, self_attention: bool) -> None:
    """A layer of the kind that is not replaced does what it always does."""
    taken = Replacement(cross=token_map() if cross else None, self_attention=self_attention)
    attn, pixels, text = layer(cross=not cross), noise(3, PIXELS, WIDTH, seed=1), noise(3, TOKENS, WIDTH, seed=2)
    context = None if cross else text
    assert torch.equal(attn(pixels, context, replacement=taken), attn(pixels, context))


@torch.no_grad()
def test_without_replacement_a_unet_gives_what_diffusers_own_processors_give() -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model, generator = unet(), torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, TEXT_WIDTH, generator=generator)
    outputs = {}
    for processor in (AttnProcessor(), AttnProcessor2_0(), ReplacingAttention()):
        model.set_attn_processor(processor)
        outputs[type(processor)] = model(latents, 500, encoder_hidden_states=text).sample
    assert torch.equal(outputs[ReplacingAttention], outputs[AttnProcessor2_0])
    assert torch.allclose(outputs[ReplacingAttention], outputs[AttnProcessor], atol=1e-5)


@torch.no_grad()
def test_a_unet_hands_the_replacement_to_its_layers() -> None:
    """An edit of the source's latents and text, all attention taken over, is the source; of others it is neither the
    source nor what it is without."""
    model = unet()
    model.set_attn_processor(ReplacingAttention())
    generator = torch.Generator().manual_seed(0)
    latents, texts = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, TEXT_WIDTH, generator=generator)
    same = TokenMap(torch.eye(77), torch.zeros(77))
    options = {"cross_attention_kwargs": {"replacement": Replacement(cross=same, self_attention=True)}}
    plain = model(latents, 500, encoder_hidden_states=texts).sample
    taken = model(latents, 500, encoder_hidden_states=texts, **options).sample
    assert torch.allclose(taken[:2], plain[:2], atol=1e-5)
    assert not torch.allclose(taken[2], plain[2], atol=1e-3)
    latents[2], texts[2] = latents[0], texts[0]
    twin = model(latents, 500, encoder_hidden_states=texts, **options).sample
    assert torch.allclose(twin[2], twin[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(dtype: torch.dtype) -> None:
    exact = layer(cross=True)
    half = layer(cross=True).to(dtype)
    pixels, text = noise(3, PIXELS, WIDTH, seed=1), noise(3, TOKENS, WIDTH, seed=2)
    taken = Replacement(cross=token_map(), self_attention=True)
    output = half(pixels.to(dtype), text.to(dtype), replacement=taken)
    assert output.dtype == dtype
    assert torch.allclose(output.double(), exact(pixels, text, replacement=taken), atol=0.05)
