"""An adapter at lower ranks: of every layer's update the part that is largest (Eckart and Young, 1936)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2gan.lora import Adapter, check_fit, crucial_layers
from e2gan.model import Generator
from e2gan.ranks import Ranks


def truncate(adapter: Adapter, generator: Generator, ranks: Ranks) -> tuple[Adapter, float]:
    """The adapter with every layer at its rank in `ranks`, or its own where that is lower or none is given.

    With it the share of the update's energy (sum of squares) that is kept, over all layers, 0..1.

    Raises:
        ValueError: the adapter is not one for a generator of this shape, or a rank is below 1.
    """
    layers = crucial_layers(generator)
    check_fit(adapter, layers)
    low = [name for name, rank in ranks.items() if rank < 1]
    if low:
        raise ValueError(f"rank of {low[0]} must be at least 1, not {ranks[low[0]]}")
    tensors: dict[str, Tensor] = {}
    kept = total = 0.0
    new_ranks: Ranks = {}
    for name, rank in adapter.ranks.items():
        a, b = (adapter.tensors[f"{name}.lora_{side}"] for side in "AB")
        transposed = isinstance(layers[name], nn.ConvTranspose2d)
        rows = (a.transpose(0, 1) if transposed else a).flatten(1)  # [r, everything else]
        columns = b.flatten(1)  # [out, r]
        # The SVD of B A by way of small ones: both factors are thin.
        q_b, r_b = torch.linalg.qr(columns.double())
        q_a, r_a = torch.linalg.qr(rows.T.double())
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        rank = new_ranks[name] = min(rank, ranks.get(name, rank), len(s))
        kept += float(s[:rank].square().sum())
        total += float(s.square().sum())
        root = s[:rank].sqrt()
        new_b = (q_b @ u[:, :rank] * root).float()
        new_a = (root[:, None] * (v[:rank] @ q_a.T)).float()
        shape = (a.shape[1], a.shape[0], *a.shape[2:]) if transposed else a.shape
        new_a = new_a.reshape(rank, *shape[1:])
        tensors[f"{name}.lora_A"] = (new_a.transpose(0, 1) if transposed else new_a).contiguous()
        tensors[f"{name}.lora_B"] = new_b.reshape(b.shape[0], rank, *b.shape[2:]).contiguous()
    truncated = Adapter(ranks=new_ranks, scale=adapter.scale, tensors=tensors)
    return truncated, kept / total if total else 1.0
