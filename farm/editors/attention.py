"""Prompt-to-prompt's attention replacement as an attention processor of diffusers.

Prompt-to-Prompt (Hertz et al. 2022), section 4, with the choices of the authors' repository google/prompt-to-prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from farm.editors.alignment import TokenMap

SELF_REPLACE_PIXELS = 32**2
"""Self-attention is replaced in layers of at most this many pixels: finer ones would copy the source's texture too.

This is what the authors' null-text code has; their prompt-to-prompt code, for generated images, has 16**2.
"""


@dataclass(frozen=True)
class Replacement:
    """What the edits of a batch take over from their sources in one step of the denoising.

    cross: of the cross-attention maps, or None for nothing. self_attention: whether the self-attention maps.
    """

    cross: TokenMap | None
    self_attention: bool


class ReplacingAttention:
    """An attention processor for a UNet2DConditionModel of the Stable Diffusion kind.

    The batch is three parts of equal size: sources, images that attend as they like (the unconditional half of
    guidance), and edits; edit i takes over from source i what `cross_attention_kwargs={"replacement": Replacement}`
    of the UNet says. Without it this is diffusers' own AttnProcessor2_0, for any batch.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self._plain = AttnProcessor2_0()  # type: ignore[no-untyped-call]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        replacement: Replacement | None = None,
    ) -> Tensor:
        """`[batch, pixels, width]` to the same. encoder_hidden_states: the text `[batch, k, d]` in cross-attention."""
        if replacement is not None:
            if encoder_hidden_states is None:
                if replacement.self_attention and hidden_states.shape[1] <= SELF_REPLACE_PIXELS:
                    return _replace_self(attn, hidden_states)
            elif replacement.cross is not None:
                return _replace_cross(attn, hidden_states, encoder_hidden_states, replacement.cross)
        plain: Tensor = self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return plain


def _replace_self(attn: Any, pixels: Tensor) -> Tensor:
    query, key, value = _heads(attn, pixels, pixels)
    # A map is made of queries and keys: with the source's an edit has the source's map, which need not be computed.
    query, key = (torch.cat([source, free, source]) for source, free, _ in (query.chunk(3), key.chunk(3)))
    return _output(attn, F.scaled_dot_product_attention(query, key, value))


def _replace_cross(attn: Any, pixels: Tensor, text: Tensor, tokens: TokenMap) -> Tensor:
    query, key, value = _heads(attn, pixels, text)
    return _output(attn, cross_maps(query, key, tokens).to(value) @ value)


def cross_maps(query: Tensor, key: Tensor, tokens: TokenMap) -> Tensor:
    """Of `[batch, heads, n, d]` and `[batch, heads, k, d]` the float32 maps `[batch, heads, n, k]`, of which the last
    third is replaced."""
    scores: Tensor = query.float() @ key.float().mT / math.sqrt(query.shape[-1])
    source, free, own = scores.softmax(dim=-1).chunk(3)
    edit = source @ tokens.from_source + own * tokens.from_own
    return torch.cat([source, free, edit])


def _heads(attn: Any, pixels: Tensor, context: Tensor) -> list[Tensor]:
    """Queries of the pixels, keys and values of the context: `[batch, heads, n, d]`."""
    projected = (attn.to_q(pixels), attn.to_k(context), attn.to_v(context))
    return [tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in projected]


def _output(attn: Any, heads: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    output: Tensor = dropout(projection(heads.transpose(1, 2).flatten(2)))
    return output
