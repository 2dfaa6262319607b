"""The teacher that is any image-to-image network in an ONNX file, run by ONNX Runtime.

Input and output are float32 `[batch, 3, height, width]`, RGB in 0..1, of one size. The prompt and the seeds
are not read: such a network knows one edit and always makes the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from farm.editors.base import Failed, Prompt
from farm.editors.weights import file_sha256
from farm.errors import UserError, brief

if TYPE_CHECKING:
    from e2gan.pairs import Image

MULTIPLE = 4
"""Sides are padded to a multiple of this, which two halvings and two doublings give back unchanged."""

Batch = NDArray[np.floating[Any]]
"""`[batch, 3, height, width]`, RGB in 0..1."""


class OnnxSettings(BaseModel):
    """`path`: the model file. `batch_size`: the most images in one run of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeded: ClassVar[bool] = False

    kind: Literal["onnx"] = "onnx"
    path: str
    batch_size: int = Field(default=8, ge=1)


class OnnxEditor:
    """An `Editor` that runs one ONNX model, on the GPU where ONNX Runtime offers CUDA.

    `threads`: CPU threads for the model; left out, `OMP_NUM_THREADS`, which Ray sets to a task's CPUs, or
    else ONNX Runtime's own choice (all cores).

    Raises:
        UserError: there is no such file, or it is not a model with such an input.
    """

    def __init__(self, settings: OnnxSettings, *, threads: int | None = None) -> None:
        import onnxruntime

        path = _model_file(settings)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _threads_of_environment() if threads is None else threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # what goes wrong comes back as an exception
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise self._refusal(path, f"is not an ONNX model that can be loaded ({brief(error)})") from error
        self._path = path
        self._batch_size = settings.batch_size
        self._input, self._fixed_batch, self._fixed_size = self._check_input()
        self._output: str = self._session.get_outputs()[0].name

    def edit(self, images: Sequence[Image], prompt: Prompt, seeds: Sequence[int]) -> list[Image | Failed]:
        """See `Editor.edit`. Sides that are no multiple of 4 are reflect-padded and cut back."""
        assert len(images) == len(seeds)
        by_size = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.shape[:2]].append(index)
        edited: dict[int, Image] = {}
        step = self._fixed_batch or self._batch_size
        for indices in by_size.values():
            for start in range(0, len(indices), step):
                chosen = indices[start : start + step]
                edited.update(zip(chosen, self._edit_alike([images[i] for i in chosen]), strict=True))
        return [edited[index] for index in range(len(images))]

    def _edit_alike(self, images: Sequence[Image]) -> list[Image]:
        height, width = images[0].shape[:2]
        batch = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255
        padding = ((0, 0), (0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE))
        padded = np.pad(batch, padding, mode="reflect")
        if self._fixed_batch:  # a model exported for one batch size gets exactly that many
            padded = padded[np.arange(self._fixed_batch) % len(images)]
        output = self._run(padded)[: len(images), :, :height, :width]
        levels = np.rint(output.clip(0, 1) * 255).astype(np.uint8)
        return list(np.ascontiguousarray(levels.transpose(0, 2, 3, 1)))

    def _run(self, batch: Batch) -> Batch:
        height, width = batch.shape[2:]
        for wanted, given in zip(self._fixed_size, (height, width), strict=True):
            if wanted not in (None, given):
                sizes = " x ".join(str(side or "any") for side in self._fixed_size)
                raise self._refusal(
                    self._path,
                    f"takes images of {sizes} pixels only, not {height} x {width} (see sources.size)",
                )
        try:
            output = self._session.run([self._output], {self._input: batch})[0]
        except Exception as error:  # as above
            problem = f"failed on images of {height} x {width} ({brief(error)})"
            raise self._refusal(self._path, problem) from error
        if output.shape != batch.shape or output.dtype != np.float32:
            raise self._refusal(
                self._path,
                f"turned float32 {batch.shape} into {output.dtype} {output.shape}, not into the same",
            )
        if not np.isfinite(output).all():
            raise self._refusal(self._path, "gave NaN or infinite pixels")
        if np.abs(output).mean() > 2:
            raise self._refusal(self._path, f"gave pixels up to {output.max():.0f} instead of 0..1")
        return cast(Batch, output)

    def _check_input(self) -> tuple[str, int | None, tuple[int | None, int | None]]:
        """The input's name, and the batch size, height and width it is bound to, if any."""
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise self._refusal(self._path, f"has {len(inputs)} inputs instead of one")
        shape = inputs[0].shape
        rgb = len(shape) == 4 and (shape[1] == 3 or not isinstance(shape[1], int))
        if inputs[0].type != "tensor(float)" or not rgb:
            raise self._refusal(self._path, f"has an input {inputs[0].type} {shape} of another kind")
        batch, height, width = (shape[i] if isinstance(shape[i], int) else None for i in (0, 2, 3))
        return inputs[0].name, batch, (height, width)

    @staticmethod
    def _refusal(path: Path, problem: str) -> UserError:
        return UserError(
            f"editor.path: {path} {problem}; export the teacher as an ONNX model from RGB images, float32 "
            "[batch, 3, height, width] in 0..1, to images of the same shape and range."
        )


def fingerprint(settings: OnnxSettings) -> dict[str, Any]:
    """The model's content. Neither its path nor the batch size changes an edit.

    Weights beside the model are found by their names, which begin with the model's, such as `model.onnx.data`.

    Raises:
        UserError: there is no such file.
    """
    path = _model_file(settings)
    beside = [other for other in path.parent.iterdir() if other.name.startswith(path.name) and other.is_file()]
    hashes = [file_sha256(file) for file in sorted(beside)]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return {"kind": settings.kind, "sha256": sha256}


def _model_file(settings: OnnxSettings) -> Path:
    path = Path(settings.path).expanduser()
    if not path.is_file():
        raise UserError(f"editor.path: there is no file {path}; name an ONNX model on this machine.")
    return path


def _threads_of_environment() -> int:
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() else 0
