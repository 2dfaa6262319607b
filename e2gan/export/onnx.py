"""ONNX models of many concepts that share one file of base weights.

`base.bin` holds the base in fp16 or int8; a concept's model is the graph and its own tensors in fp16, and points into
`base.bin`. Runtimes widen both when they load a model: files are small, and the computation is float32, or whatever the
runtime's device prefers. The other way round, one model that takes a concept's tensors as inputs, `write_open` makes:
concepts change without loading anything, but every edit pays for weights that the runtime cannot prepare beforehand
(docs/phones.md has both, measured).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from e2gan.export.libraries import onnx, quietly
from e2gan.export.mlpackage import INPUT, OUTPUT
from e2gan.export.phone import PhoneGenerator, random_concept
from e2gan.infer import check_sides
from e2gan.model import Generator
from e2gan.ranks import Ranks

Precision = Literal["fp16", "int8"]
BASE = "base.bin"
_ALIGN = 64
_SMALLEST = 1024
"""Numbers of a constant that is worth a place in base.bin, and bits."""


class OnnxTemplate:
    """The graph of a generator with LoRA branches of these ranks, for square images of `side` px.

    Raises:
        ValueError: a side that the network cannot take, ranks of layers it does not have, or onnx is missing.
    """

    def __init__(self, base: Generator, ranks: Ranks, *, side: int, precision: Precision = "fp16") -> None:
        self._onnx = onnx()
        concept = random_concept(base, ranks, seed=0)
        self.names = tuple(concept)
        self.base = bytearray()
        model = _exported(base, concept, side)
        graph = model.graph
        readers = {name: node for node in graph.node for name in node.input}
        for held in list(graph.initializer):
            array = self._onnx.numpy_helper.to_array(held)
            if array.dtype == np.float32 and array.size >= _SMALLEST:
                graph.initializer.remove(held)
                if precision == "int8" and array.ndim > 1:
                    self._quantised(graph, held.name, array, readers[held.name].op_type)
                else:
                    self._halved(graph, held.name, array)
        self._model = model

    def write_base(self, folder: Path) -> None:
        """Write `base.bin`."""
        (folder / BASE).write_bytes(self.base)

    def write(self, path: Path, concept: Mapping[str, NDArray[np.float16]]) -> None:
        """Write a concept's model beside `base.bin`. The tensors have the template's shapes."""
        model = type(self._model)()
        model.CopyFrom(self._model)
        shapes = {given.name: _shape(given) for given in model.graph.input}
        for name in self.names:
            assert concept[name].shape == shapes[name], f"{name} has shape {concept[name].shape}"
            _cast(self._onnx, model.graph, name, self._onnx.numpy_helper.from_array(concept[name], f"{name}.half"))
        taken = [given for given in model.graph.input if given.name == INPUT]
        del model.graph.input[:]
        model.graph.input.extend(taken)
        path.write_bytes(model.SerializeToString(deterministic=True))

    def write_open(self, path: Path) -> None:
        """Write a model that takes a concept's tensors as inputs, float32, beside `base.bin`."""
        path.write_bytes(self._model.SerializeToString(deterministic=True))

    def _halved(self, graph: Any, name: str, array: NDArray[np.float32]) -> None:
        _cast(self._onnx, graph, name, self._outside(f"{name}.half", array.astype(np.float16)))

    def _quantised(self, graph: Any, name: str, array: NDArray[np.float32], reader: str) -> None:
        axis = {"ConvTranspose": 1, "MatMul": array.ndim - 1}.get(reader, 0)
        others = tuple(n for n in range(array.ndim) if n != axis)
        scale = np.maximum(np.abs(array).max(others) / 127, 1e-12).astype(np.float32)
        shape = [-1 if n == axis else 1 for n in range(array.ndim)]
        whole = np.rint(array / scale.reshape(shape)).clip(-127, 127).astype(np.int8)
        helper = self._onnx.helper
        graph.initializer.append(self._outside(f"{name}.int8", whole))
        graph.initializer.append(self._onnx.numpy_helper.from_array(scale, f"{name}.scale"))
        node = helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=axis)
        graph.node.insert(0, node)

    def _outside(self, name: str, array: NDArray[Any]) -> Any:
        """A tensor whose content is in base.bin."""
        self.base += b"\0" * (-len(self.base) % _ALIGN)
        tensor = self._onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=self._onnx.TensorProto.EXTERNAL,
        )
        place = {"location": BASE, "offset": len(self.base), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.base += array.tobytes()
        return tensor


class OnnxFunction:
    """A model as onnxruntime runs it on this CPU: uint8 images `[n, 3, h, w]` to the same."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor, concept: Mapping[str, NDArray[np.float16]] | None = None) -> Tensor:
        """concept: for a model that `OnnxTemplate.write_open` wrote."""
        more = {name: array.astype(np.float32) for name, array in (concept or {}).items()}
        edited = [self.session.run([OUTPUT], {INPUT: image[None].float().numpy(), **more})[0] for image in images]
        return torch.from_numpy(np.concatenate(edited)).clamp(0, 255).to(torch.uint8)


class _Open(nn.Module):
    """A phone's generator that takes the concept's tensors as arguments."""

    def __init__(self, network: PhoneGenerator, concept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.names = [f"generator.{name}" for name in concept]

    def forward(self, image: Tensor, *tensors: Tensor) -> Tensor:
        edited: Tensor = torch.func.functional_call(
            self.network, dict(zip(self.names, tensors, strict=True)), (image,), strict=False
        )
        return edited


def _exported(base: Generator, concept: Mapping[str, Tensor], side: int) -> Any:
    """The graph with the concept's tensors as inputs, under their names."""
    image = torch.zeros(1, 3, side, side)
    check_sides(image)
    network = _Open(PhoneGenerator(base, concept), concept).eval()
    with quietly():
        program = torch.onnx.export(
            network,
            (image, *concept.values()),
            input_names=[INPUT, *concept],
            output_names=[OUTPUT],
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # where in the sources it came from: as large as the weights of a small concept
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for field in ("value_info", "metadata_props"):
        model.graph.ClearField(field)
    for given in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        given.ClearField("metadata_props")
    return model


def _cast(library: Any, graph: Any, name: str, half: Any) -> None:
    """Give the graph an fp16 constant, widened under that name."""
    graph.initializer.append(half)
    float32 = library.TensorProto.FLOAT
    graph.node.insert(0, library.helper.make_node("Cast", [half.name], [name], to=float32))


def _shape(given: Any) -> tuple[int, ...]:
    return tuple(dimension.dim_value for dimension in given.type.tensor_type.shape.dim)
