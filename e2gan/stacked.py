"""Mixed batches: every image of a batch with an adapter of its own, in one pass (for GPUs; a CPU switches faster).

The adapters stay unmerged. A of all adapters is one tensor a layer, B another; a batch picks its samples' rows, and
each layer adds B_i A_i x to W x by one grouped convolution and one batched product, however many adapters it mixes.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2gan.config import TrainConfig
from e2gan.fast import share
from e2gan.infer import check_sides
from e2gan.lora import Adapter, check_fit, crucial_layers
from e2gan.model import Generator
from e2gan.pairs import to_bytes, to_unit
from e2gan.train import uses_bf16


class StackedAdapters:
    """A generator and its adapters, for batches that mix them; adapters may differ in layers, ranks and scales.

    base: a plain generator; it is not changed and its tensors may be shared.
    device: where to compute; the base's when None.
    dtype: weights and computation; when None bf16 where the device computes in it, else float32.
    compile: with torch.compile; adding an adapter compiles nothing unless it raises a layer's highest rank.
    """

    def __init__(
        self,
        base: Generator,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.device = torch.device(device or next(base.parameters()).device)
        self.dtype = dtype or (torch.bfloat16 if uses_bf16(TrainConfig(), self.device) else torch.float32)
        self._base = base
        self._module = share(base).eval().to(self.device, self.dtype).to(memory_format=torch.channels_last)
        self._stacks: dict[str, Tensor] = {}  # `<layer>.a` and `<layer>.b`, `[adapters, ...]`
        self._texts = torch.empty(0, base.config.text_tokens, base.config.text_width)
        for name, layer in crucial_layers(base).items():
            branched = _BRANCHED[type(layer)](cast("nn.Conv2d", self._module.get_submodule(name)))
            self._module.set_submodule(name, branched)
            for side in ("a", "b"):
                self._stacks[f"{name}.{side}"] = getattr(branched, side)
        self._stacks = {name: self._placed(stack) for name, stack in self._stacks.items()}
        self._texts = self._placed(self._texts)
        self._run = torch.compile(self._forward) if compile else self._forward

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        """Memory of all adapters and their prompts."""
        return sum(tensor.nbytes for tensor in (*self._stacks.values(), self._texts))

    def add(self, adapter: Adapter, text: Tensor, *, instead: int | None = None) -> int:
        """Stack one more adapter with its prompt's embedding `[77, 768]`; its number, for a batch to name it by.

        instead: the number of an adapter whose place it takes. Batches that were begun keep that one.

        Raises:
            ValueError: the adapter is not one for a generator of this shape.
        """
        number = len(self) if instead is None else instead
        layers = crucial_layers(self._base)
        check_fit(adapter, layers)
        for name, layer in layers.items():
            rows: tuple[Tensor | None, Tensor | None] = (None, None)
            if name in adapter.ranks:
                a, b = (adapter.tensors[f"{name}.lora_{side}"] for side in "AB")
                if isinstance(layer, nn.ConvTranspose2d):
                    a = a.transpose(0, 1)  # [r, in, k, k], like a convolution's
                rows = (a, adapter.scale * b.flatten(1).T)
            for side, row in zip("ab", rows, strict=True):
                self._stacks[f"{name}.{side}"] = self._with(self._stacks[f"{name}.{side}"], row, number)
        if number == len(self):
            self._texts = torch.cat([self._texts, self._placed(text[None])])
        else:
            self._texts[number] = self._placed(text)
        return number

    @torch.inference_mode()
    def __call__(self, images: Tensor, which: Tensor) -> Tensor:
        """Edit uint8 images `[n, 3, h, w]`, each with the adapter of its number in `which` `[n]`.

        uint8 of the same shape comes back, on the device.

        Raises:
            ValueError: h or w is below 16 or not a multiple of 8.
        """
        check_sides(images)
        which = which.to(self.device)
        # Picked before the graph, so that the number of adapters is no part of it.
        picked = {name: stack[which] for name, stack in self._stacks.items()}
        edited: Tensor = self._run(picked, images.to(self.device), self._texts[which])
        return edited

    def _forward(self, picked: dict[str, Tensor], images: Tensor, texts: Tensor) -> Tensor:
        unit = to_unit(images).to(self.dtype, memory_format=torch.channels_last)
        return to_bytes(torch.func.functional_call(self._module, picked, (unit, texts)))

    def _with(self, stack: Tensor, row: Tensor | None, number: int) -> Tensor:
        """The stack with an adapter's `[rank, ...]` at its number, which may be one more than there are.

        Zeros fill up the lower rank, which changes no product.
        """
        rank = stack.shape[1] if row is None else max(stack.shape[1], len(row))
        if number == len(stack) or rank > stack.shape[1]:
            grown = stack.new_zeros(max(len(stack), number + 1), rank, *stack.shape[2:])
            grown[: len(stack), : stack.shape[1]] = stack
            stack = grown
        stack[number] = 0
        if row is not None:
            stack[number, : len(row)] = self._placed(row)
        return stack

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype)


class _Branched(nn.Module):
    """A layer and, for every sample, a branch of its own: a `[n, r, in, k, k]` or `[n, r, in]`, b `[n, r, out]`."""

    a: Tensor
    b: Tensor

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        ends = (layer.weight.shape[1], layer.weight.shape[0])  # in, out
        if isinstance(layer, nn.ConvTranspose2d):
            ends = ends[::-1]
        self.register_buffer("a", torch.empty(0, 1, ends[0], *layer.weight.shape[2:]))
        self.register_buffer("b", torch.empty(0, 1, ends[1]))

    def _project(self, y: Tensor, n: int) -> Tensor:
        """B times what A made, `[1, n r, h, w]`: `[n, out, h, w]`."""
        y = y.view(n, -1, *y.shape[2:])
        return torch.bmm(self.b.transpose(1, 2), y.flatten(2)).view(n, -1, *y.shape[2:])


class _BranchedConvolution(_Branched):
    def forward(self, x: Tensor) -> Tensor:
        n, layer = len(x), self.layer
        y = F.conv2d(x.flatten(0, 1)[None], self.a.flatten(0, 1), None, layer.stride, layer.padding, groups=n)
        out: Tensor = layer(x) + self._project(y, n)
        return out


class _BranchedTransposed(_Branched):
    def forward(self, x: Tensor) -> Tensor:
        n, layer = len(x), cast("nn.ConvTranspose2d", self.layer)
        y = F.conv_transpose2d(
            x.flatten(0, 1)[None],
            self.a.transpose(1, 2).flatten(0, 1),  # [n in, r, k, k]
            None,
            layer.stride,
            cast("tuple[int, ...]", layer.padding),
            layer.output_padding,
            groups=n,
        )
        out: Tensor = layer(x) + self._project(y, n)
        return out


class _BranchedLinear(_Branched):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + torch.bmm(torch.bmm(x, self.a.transpose(1, 2)), self.b)
        return out


_BRANCHED = {nn.Conv2d: _BranchedConvolution, nn.ConvTranspose2d: _BranchedTransposed, nn.Linear: _BranchedLinear}
