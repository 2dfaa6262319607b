"""Core ML packages as files: reading one function of a package, and writing a package of many that share their weights.

A package is a protobuf (`model.mlmodel`: the functions, operation by operation) and a file of large constants
(`weight.bin`) that the operations point into. coremltools joins functions by loading all of them, each with a copy of
the base, so that its memory grows with their number. Here a function is converted once (`e2gan.export.coreml`) and
written again for every concept with that concept's constants; nothing but what the concept adds is in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2gan.export.libraries import coremltools

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
INPUT, OUTPUT = "image", "edited"
"""The one input and the one output of every function: RGB images."""
_KINDS = {
    "FLOAT16": ("fp16", np.uint16),
    "FLOAT32": ("float", np.float32),
    "INT8": ("int8", np.int8),
    "UINT8": ("uint8", np.uint8),
    "INT4": ("int4", np.int8),
    "UINT4": ("uint4", np.uint8),
    "UINT6": ("uint6", np.uint8),
    "INT32": ("int32", np.int32),
}
"""How weight.bin's reader and writer name a type, and what they take."""


def read_model(package: Path) -> Any:
    """The protobuf of a package. ValueError where it is none."""
    from google.protobuf.message import DecodeError

    model = coremltools().proto.Model_pb2.Model()
    try:
        model.ParseFromString((package / MODEL).read_bytes())
    except (DecodeError, OSError) as error:
        raise ValueError(f"{package} is not a Core ML package: {error}") from error
    return model


def function_names(model: Any) -> list[str]:
    """The functions, in the order in which the package lists them."""
    return [function.name for function in model.description.functions] or ["main"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a function added to a package. weights, program: bytes of weight.bin and of model.mlmodel."""

    weights: int
    program: int


class Template:
    """A converted function whose concept can be exchanged.

    package: with the one function `main`. concept: the tensors it was converted with, no two of them alike.

    Raises:
        ValueError: a tensor of the concept is not among the function's constants as it is.
    """

    def __init__(self, package: Path, concept: Mapping[str, NDArray[np.float16]]) -> None:
        model = read_model(package)
        self.version: int = model.specificationVersion
        self.description = model.description
        self.program_version: int = model.mlProgram.version
        self.function = model.mlProgram.functions["main"]
        self.large: list[str | tuple[str, NDArray[Any]]] = []  # the concept's by name, the base's type and content
        self.small: list[str | None] = []  # the concept's by name
        _shorten(self.function)
        reader = _reader(package)
        left = {array.tobytes(): name for name, array in concept.items()}
        for value in large_values(self.function):
            kind, array = _read(reader, value)
            self.large.append(left.pop(array.tobytes()) if array.tobytes() in left else (kind, array))
        for value in _small_values(self.function):
            self.small.append(left.pop(value.immediateValue.tensor.bytes.values, None))
        if left:
            raise ValueError(f"the converter has changed {', '.join(sorted(left.values()))}: its numbers are not there")


class PackWriter:
    """Writes a package of many functions; `close` makes it one.

    since: a package whose weights are kept as they are, byte by byte, and added to, so that whoever has it needs only
        what is new. Functions of it that go on are taken over with `keep`.
    """

    def __init__(self, package: Path, *, since: Path | None = None) -> None:
        coremltools()
        from coremltools.libmilstoragepython import _BlobStorageWriter

        self.package = package
        (package / WEIGHTS).parent.mkdir(parents=True)
        self._functions: dict[str, Any] = {}
        self._descriptions: dict[str, Any] = {}
        self._offsets: dict[bytes, int] = {}  # of large constants, by the hash of their content
        self._like: Template | None = None
        self._since: Any = None
        if since:
            self._since = read_model(since)
            shutil.copyfile(since / WEIGHTS, package / WEIGHTS)
            reader = _reader(since)
            values = {
                value.blobFileValue.offset: value
                for function in self._since.mlProgram.functions.values()
                for value in large_values(function)
            }
            self._offsets = {_hash(*_read(reader, value)): offset for offset, value in values.items()}
        self._blobs = _BlobStorageWriter(str(package / WEIGHTS), since is None)

    @property
    def weights(self) -> int:
        """Bytes of weight.bin so far."""
        path = self.package / WEIGHTS
        return path.stat().st_size if path.exists() else 0

    def add(self, name: str, template: Template, concept: Mapping[str, NDArray[np.float16]]) -> Part:
        """Write the template's function under that name with the concept's tensors, of the template's shapes."""
        before = self.weights
        function = type(template.function)()
        function.CopyFrom(template.function)
        for value, held in zip(large_values(function), template.large, strict=True):
            if isinstance(held, str):
                held = "FLOAT16", _fitting(concept[held], value).view(np.uint16).ravel()
            value.blobFileValue.offset = self._put(*held)
        for value, name_of in zip(_small_values(function), template.small, strict=True):
            if name_of is not None:
                value.immediateValue.tensor.bytes.values = _fitting(concept[name_of], value).tobytes()
        proto = coremltools().proto.Model_pb2
        description = proto.FunctionDescription(
            name=name, input=template.description.input, output=template.description.output
        )
        self._functions[name], self._descriptions[name] = function, description
        self._like = template
        return Part(weights=self.weights - before, program=function.ByteSize())

    def keep(self, name: str) -> Part:
        """Take over a function of the package that this one goes on from."""
        assert self._since is not None
        self._functions[name] = self._since.mlProgram.functions[name]
        self._descriptions[name] = next(d for d in self._since.description.functions if d.name == name)
        return Part(weights=0, program=self._functions[name].ByteSize())

    def close(self) -> None:
        """Write model.mlmodel and the package's list of contents. The same functions give the same bytes."""
        del self._blobs  # the file is whole when its writer is gone
        model = coremltools().proto.Model_pb2.Model()
        like = self._like
        model.specificationVersion = like.version if like else self._since.specificationVersion
        model.mlProgram.version = like.program_version if like else self._since.mlProgram.version
        for name, function in self._functions.items():
            model.mlProgram.functions[name].CopyFrom(function)
            model.description.functions.append(self._descriptions[name])
        model.description.defaultFunctionName = next(iter(self._functions))
        write_model(self.package, model)

    def _put(self, kind: str, array: NDArray[Any]) -> int:
        key = _hash(kind, array)
        if key not in self._offsets:
            self._offsets[key] = getattr(self._blobs, f"write_{_KINDS[kind][0]}_data")(np.ascontiguousarray(array))
        return self._offsets[key]


def write_model(package: Path, model: Any) -> None:
    """Write a package's protobuf, always the same bytes for the same model, and its list of contents."""
    data = model.SerializeToString(deterministic=True)
    (package / MODEL).write_bytes(data)
    entries = {}
    for name, what in (("model.mlmodel", "CoreML Model Specification"), ("weights", "CoreML Model Weights")):
        id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {hashlib.sha256(data).hexdigest()}"))
        path = f"com.apple.CoreML/{name}"
        entries[id] = {"author": "com.apple.CoreML", "description": what, "name": name, "path": path}
    root = next(iter(entries))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")


def operations(function: Any) -> Any:
    """The operations of a function: the converter writes one block, for one version of the operations."""
    return function.block_specializations[function.opset].operations


def only(model: Any, name: str) -> Any:
    """A model of that function alone, as `main`; the weights it points to are those of the whole package.

    KeyError where there is no such function.
    """
    if name not in model.mlProgram.functions:
        raise KeyError(name)
    alone = type(model)()
    alone.specificationVersion = model.specificationVersion
    alone.mlProgram.version = model.mlProgram.version
    alone.mlProgram.functions["main"].CopyFrom(model.mlProgram.functions[name])
    described = next((d for d in model.description.functions if d.name == name), model.description)
    alone.description.input.extend(described.input)
    alone.description.output.extend(described.output)
    return alone


def _shorten(function: Any) -> None:
    """Give every value a short name, and small constants that are alike one place: half of a function is names."""
    names = {given.name: given.name for given in function.inputs}
    known: dict[bytes, str] = {}
    block = function.block_specializations[function.opset]
    kept = []
    for operation in block.operations:
        if operation.type == "const" and operation.attributes["val"].WhichOneof("value") == "immediateValue":
            content = operation.attributes["val"].SerializeToString(deterministic=True)
            if content in known and not _numbers(operation):
                names[operation.outputs[0].name] = known[content]
                continue
            known[content] = f"v{len(names)}"
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = names[binding.name]
        for output in operation.outputs:
            new = output.name if output.name in block.outputs else f"v{len(names)}"
            names[output.name] = output.name = new
        if "name" in operation.attributes:
            tensor = operation.attributes["name"].immediateValue.tensor
            tensor.strings.values[0] = operation.outputs[0].name
        kept.append(type(operation).FromString(operation.SerializeToString()))
    del block.operations[:]
    block.operations.extend(kept)


def _numbers(operation: Any) -> bool:
    """Whether a small constant holds fp16 tensors of several numbers, which may be a concept's."""
    value = operation.attributes["val"]
    return bool(value.immediateValue.tensor.WhichOneof("value") == "bytes" and value.type.tensorType.rank)


def large_values(function: Any) -> list[Any]:
    """The constants of a function that lie in weight.bin, those that a decompression takes among them."""
    found = []
    for operation in operations(function):
        if operation.type == "const":
            held = [operation.attributes["val"]]
        else:
            inputs = sorted(operation.inputs.items())
            held = [b.value for _, given in inputs for b in given.arguments if b.WhichOneof("binding") == "value"]
        found += [value for value in held if value.WhichOneof("value") == "blobFileValue"]
    return found


def _small_values(function: Any) -> list[Any]:
    """The fp16 tensors of a function that are so small that they stand in the program itself."""
    constants = [operation.attributes["val"] for operation in operations(function) if operation.type == "const"]
    return [value for value in constants if value.immediateValue.tensor.WhichOneof("value") == "bytes"]


def _fitting(array: NDArray[np.float16], value: Any) -> NDArray[np.float16]:
    shape = tuple(dimension.constant.size for dimension in value.type.tensorType.dimensions)
    assert array.shape == shape, f"a template for tensors of shape {shape} was given one of shape {array.shape}"
    return array


def _reader(package: Path) -> Any:
    from coremltools.libmilstoragepython import _BlobStorageReader

    return _BlobStorageReader(str(package / WEIGHTS))


def _read(reader: Any, value: Any) -> tuple[str, NDArray[Any]]:
    kind: str = coremltools().proto.MIL_pb2.DataType.Name(value.type.tensorType.dataType)
    return kind, np.asarray(getattr(reader, f"read_{_KINDS[kind][0]}_data")(value.blobFileValue.offset))


def _hash(kind: str, array: NDArray[Any]) -> bytes:
    return hashlib.sha256(kind.encode() + np.ascontiguousarray(array).tobytes()).digest()
