"""Checkpoints of a training: all that the next step depends on, as bytes, and a folder that keeps the last two."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from e2gan.weights import load_weights, save_weights

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's and AdamW's state of one parameter."""


class CheckpointError(ValueError):
    """Bytes that a training cannot go on from: no checkpoint, a damaged one, or another run's."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network in training: what trains, its optimiser, and the moving averages of its weights, if they are kept."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    averages: Mapping[str, Tensor]


def pack(step: int, identity: Mapping[str, object], networks: Mapping[str, Network]) -> bytes:
    """Trained weights, optimiser moments and averages as safetensors, with the step and the run's identity.

    Nothing random is kept: the order of the data and its augmentation are functions of seed and step.
    """
    tensors: dict[str, Tensor] = {}
    for network, state in networks.items():
        for name, parameter in state.parameters.items():
            tensors[f"{network}/{name}"] = parameter
            for moment, value in state.optimizer.state.get(parameter, {}).items():
                tensors[f"{network}/{name}/{moment}"] = value
        for name, average in state.averages.items():
            tensors[f"{network}/{name}/average"] = average
    return save_weights(tensors, training=json.dumps({"step": step, "identity": identity}))


def unpack(checkpoint: bytes, identity: Mapping[str, object], networks: Mapping[str, Network]) -> int:
    """Put a checkpoint's state into the networks and return its step; nothing changes where it does not fit.

    Raises:
        CheckpointError: the bytes are no checkpoint, are damaged, or are another run's.
    """
    try:
        tensors, metadata = load_weights(checkpoint, sealed=True)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if "training" not in metadata:
        raise CheckpointError("not a training checkpoint, but other weights")
    training = json.loads(metadata["training"])
    wanted = json.loads(json.dumps(identity))  # a tuple comes back as a list
    if training["identity"] != wanted:
        odd = [key for key in wanted if training["identity"].get(key) != wanted[key]]
        raise CheckpointError(
            f"this checkpoint belongs to another training run: its {', '.join(odd)} differ; remove it"
        )
    shapes, optional = _shapes(networks)
    for key in sorted({**tensors, **shapes}):
        absent = key not in tensors and key not in optional
        if absent or key not in shapes or (key in tensors and tensors[key].shape != shapes[key]):
            raise CheckpointError(f"this checkpoint belongs to another network: {key.replace('/', ' ')} differs")
    for network, state in networks.items():
        for name, parameter in state.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"{network}/{name}"])
            for moment in MOMENTS:
                key = f"{network}/{name}/{moment}"
                if key in tensors:  # absent where this network had not been updated yet
                    # Empty strided like the parameter: Adam's fused kernel wants the moments in its memory format.
                    value = tensors[key].to(parameter.device)
                    state.optimizer.state[parameter][moment] = (
                        value if moment == "step" else torch.empty_like(parameter).copy_(value)
                    )
        for name, average in state.averages.items():
            average.copy_(tensors[f"{network}/{name}/average"])
    return int(training["step"])


def _shapes(networks: Mapping[str, Network]) -> tuple[dict[str, torch.Size], set[str]]:
    """The shape of everything a checkpoint may hold, and what of it may be missing: moments before the first update."""
    shapes: dict[str, torch.Size] = {}
    moments: dict[str, torch.Size] = {}
    for network, state in networks.items():
        for name, parameter in state.parameters.items():
            shapes[f"{network}/{name}"] = parameter.shape
            for moment in MOMENTS:
                moments[f"{network}/{name}/{moment}"] = torch.Size() if moment == "step" else parameter.shape
        for name, average in state.averages.items():
            shapes[f"{network}/{name}/average"] = average.shape
    return shapes | moments, set(moments)


class CheckpointFolder:
    """Checkpoints as files of one folder: whole or not there, and at most two.

    `train(..., on_checkpoint=folder.save, checkpoint=folder.latest())` starts or goes on.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def save(self, step: int, checkpoint: bytes) -> None:
        """Write `<step>.safetensors` under a temporary name, rename it, then drop all but the newest two."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{step:08d}.partial"
        with partial.open("wb") as file:
            file.write(checkpoint)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        partial.replace(self.path / f"{step:08d}.safetensors")
        for old in self._files()[:-2]:
            old.unlink()

    def latest(self) -> bytes | None:
        """The newest checkpoint, or None."""
        files = self._files()
        return files[-1].read_bytes() if files else None

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))
