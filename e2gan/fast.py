"""The generator rewritten for inference on a CPU: the same function of the same crucial weights, in less time.

Three parts are replaced, each exactly the same arithmetic in another order (bench/infer.py measures them):

- residual blocks by Winograd's F(2x2, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR
  2016): 2.25 times fewer multiplications. No adapter changes a residual block, so its weights are transformed once;
- the head, whose three output channels leave most of a processor's vectors empty, by a one-row convolution to
  seven times as many channels, whose rows are then added up;
- attention by plain matrix products, faster than the fused kernel at heads of 32 channels and an image's tokens.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2gan.model import Attention, Generator, ResidualBlock

# Above this many scores (queries times keys) PyTorch's fused attention, which never stores them, takes over.
_STORED_SCORES = 4096**2

_M = TypeVar("_M", bound=nn.Module)


def fast_generator(generator: Generator) -> Generator:
    """A copy whose forward is faster on a CPU; every parameter but the residual blocks' is shared with `generator`.

    The crucial layers keep their names and weights, so that merged adapters fit it. It is for inference: sides must be
    multiples of 8, as everywhere.
    """
    fast = share(generator)
    for name, module in list(fast.named_modules()):
        if isinstance(module, ResidualBlock):
            fast.set_submodule(name, WinogradBlock(module))
        elif isinstance(module, Attention):
            fast.set_submodule(name, PlainAttention(module))
    fast.set_submodule("head", RowConvolution(fast.head))
    return fast.eval()


def share(module: _M) -> _M:
    """A frozen copy of the module on the same memory, so that its layers can be replaced, moved or cast."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, parameters)


class WinogradBlock(nn.Module):
    """A residual block, `[n, c, h, w]` to the same, h and w even, for channels-last memory."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(winograd_weight(block.conv1.weight), requires_grad=False)
        self.weight2 = nn.Parameter(winograd_weight(block.conv2.weight), requires_grad=False)
        # The biases are left out: instance norm takes them away.

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.instance_norm(_winograd(x, self.weight1)))
        out: Tensor = x + F.instance_norm(_winograd(y, self.weight2))
        return out


def winograd_weight(weight: Tensor) -> Tensor:
    """`[out, in, 3, 3]` to the transformed `[16, in, out]`, in the weight's dtype."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], device=weight.device)
    return torch.einsum("ak,bl,oikl->abio", g, g, weight.detach().float()).flatten(0, 1).to(weight.dtype)


def _winograd(x: Tensor, weight: Tensor) -> Tensor:
    """Reflection-padded 3x3 convolution without bias, by tiles of 2x2 outputs."""
    x = x.permute(0, 2, 3, 1)  # [n, h, w, c]
    # Concatenated, not padded: inductor would fuse the padding into all sixteen sums below, on one thread.
    x = torch.cat([x[:, 1:2], x, x[:, -2:-1]], 1)
    x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], 2)
    n, h, w = x.shape[0], x.shape[1] // 2 - 1, x.shape[2] // 2 - 1  # h and w in tiles
    rows = _input_transform([x[:, i : i + 2 * h - 1 : 2] for i in range(4)])
    tiles = [tile for r in rows for tile in _input_transform([r[:, :, i : i + 2 * w - 1 : 2] for i in range(4)])]
    products = torch.bmm(torch.stack(tiles).view(16, n * h * w, -1), weight).view(4, 4, n, h, w, -1)
    halves = [_output_transform(list(half)) for half in _output_transform(list(products))]
    pairs = [torch.stack(half, 3) for half in halves]  # [n, h, w, 2, c]
    return torch.stack(pairs, 2).view(n, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


def _input_transform(d: list[Tensor]) -> list[Tensor]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_transform(m: list[Tensor]) -> list[Tensor]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


class RowConvolution(nn.Module):
    """A convolution without padding or stride to few channels: `[n, in, h, w]` to `[n, out, h-k+1, w-k+1]`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        assert layer.bias is not None
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out, channels, k, _ = self.weight.shape
        one_row = self.weight.permute(2, 0, 1, 3).reshape(k * out, channels, 1, k)
        n, _, height, width = x.shape
        rows = F.conv2d(x, one_row).view(n, k, out, height, width - k + 1)
        height -= k - 1
        total = sum((rows[:, i, :, i : i + height].float() for i in range(k)), self.bias.float()[:, None, None])
        return total.to(x.dtype)


class PlainAttention(nn.Module):
    """Multi-head attention of `[n, queries, c]` over `[n, keys, context]`, the scores in memory."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.q, self.k, self.v, self.out = attention.q, attention.k, attention.v, attention.out

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            # [n * heads, length, c/heads]: inductor would lay four axes out as an image and not vectorise.
            n, length, c = t.shape
            return t.view(n, length, self.heads, c // self.heads).transpose(1, 2).flatten(0, 1)

        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        if x.shape[1] * context.shape[1] > _STORED_SCORES:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            # The scale as alpha: written as a product, inductor would put the fused kernel back.
            scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
            y = torch.bmm(torch.softmax(scores, -1), v)
        out: Tensor = self.out(y.view(len(x), self.heads, *y.shape[1:]).transpose(1, 2).flatten(2))
        return out
