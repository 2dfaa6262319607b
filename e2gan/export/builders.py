"""Packs by format, all made the same way: concepts are added one by one, then everything is run as a phone would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from e2gan.export import coreml
from e2gan.export.budget import Shape
from e2gan.export.coreml import halved
from e2gan.export.mil import PackedFunction
from e2gan.export.mlpackage import PackWriter, Part, Template
from e2gan.export.onnx import OnnxFunction, OnnxTemplate
from e2gan.export.phone import concept_tensors
from e2gan.lora import Adapter
from e2gan.lora_truncate import truncate
from e2gan.model import Generator

Format = Literal["coreml", "coreml-single", "onnx"]
"""`coreml`: one package, a function a concept, iOS 18 and later; `coreml-single`: a package a concept, adapters merged,
iOS 16 and later; `onnx`: a model a concept and one file of base weights."""
PACKAGE = "pack.mlpackage"


def function_name(concept: str) -> str:
    """A concept's function in a package: a compiled package is a text, in which a hyphen or a first digit would be read
    as something else. Two ids (lower-case words joined by hyphens) never get the same name."""
    name = concept.replace("-", "_")
    return f"_{name}" if name[0].isdigit() else name


def function_in(format: Format, concept: str) -> str:
    """Where a pack of this format has the concept: the function's name, or that of a file."""
    endings = {"onnx": ".onnx", "coreml-single": ".mlpackage"}
    return f"{concept}{endings[format]}" if format in endings else function_name(concept)


class Builder(Protocol):
    """Makes a pack in a folder. Not more than one concept is in memory at a time."""

    computed: str
    """How `editor` runs it, for the certificate."""

    def add(self, name: str, adapter: Adapter, text: Tensor) -> Part:
        """Add a concept; ValueError for an adapter that does not fit the base."""

    def keep(self, name: str) -> Part:
        """Take a concept over from the pack that this one goes on from."""

    def close(self) -> None:
        """Write what all concepts share. A closed pack is whole."""

    def editor(self, name: str) -> Callable[[Tensor], Tensor]:
        """A concept of the closed pack, on uint8 images `[n, 3, h, w]`."""


class Templates:
    """What is converted once for all concepts of the same ranks, also for the next pack of the same base."""

    def __init__(self, base: Generator, *, side: int, shape: Shape) -> None:
        self.base, self.side, self.shape = base, side, shape
        self._coreml: dict[tuple[tuple[str, int], ...], Template] = {}
        self._onnx: OnnxTemplate | None = None
        self._onnx_ranks: dict[str, int] = {}

    def cut(self, adapter: Adapter) -> Adapter:
        """The adapter at the ranks that the pack has room for."""
        ranks = self.shape.ranks(adapter.ranks)
        return adapter if ranks == adapter.ranks else truncate(adapter, self.base, ranks)[0]

    def coreml(self, adapter: Adapter) -> Template:
        key = tuple(sorted(adapter.ranks.items()))
        if key not in self._coreml:
            self._coreml[key] = coreml.template(
                self.base, adapter.ranks, side=self.side, precision=self.shape.precision
            )
        return self._coreml[key]

    def onnx(self, adapter: Adapter) -> OnnxTemplate:
        """
        Raises:
            ValueError: its ranks are not those of the concepts before: they would not share one file of weights.
        """
        if self._onnx is None:
            precision = self.shape.precision
            assert precision == "fp16" or precision == "int8", "ONNX models have no others"
            self._onnx = OnnxTemplate(self.base, adapter.ranks, side=self.side, precision=precision)
            self._onnx_ranks = dict(adapter.ranks)
        if self._onnx_ranks != adapter.ranks:
            raise ValueError("its ranks are not those of the pack's other adapters; export it by itself")
        return self._onnx


class CoreMLBuilder:
    """`pack.mlpackage`. since: the folder of the pack to go on from."""

    computed = "the saved package's MIL program, read back by coremltools and run by torch, fp16 after every operation"

    def __init__(self, folder: Path, templates: Templates, *, since: Path | None = None) -> None:
        self._templates, self._package = templates, folder / PACKAGE
        self._writer = PackWriter(self._package, since=since / PACKAGE if since else None)

    def add(self, name: str, adapter: Adapter, text: Tensor) -> Part:
        adapter = self._templates.cut(adapter)
        concept = halved(concept_tensors(self._templates.base, adapter, text))
        return self._writer.add(function_name(name), self._templates.coreml(adapter), concept)

    def keep(self, name: str) -> Part:
        return self._writer.keep(function_name(name))

    def close(self) -> None:
        self._writer.close()

    def editor(self, name: str) -> Callable[[Tensor], Tensor]:
        return PackedFunction(self._package, function_name(name))


class SingleBuilder:
    """`<concept>.mlpackage`, each with the whole base."""

    computed = CoreMLBuilder.computed

    def __init__(self, folder: Path, templates: Templates) -> None:
        self._folder, self._templates = folder, templates

    def add(self, name: str, adapter: Adapter, text: Tensor) -> Part:
        from e2gan.export.mlpackage import MODEL, WEIGHTS

        package, templates = self._folder / f"{name}.mlpackage", self._templates
        precision = templates.shape.precision
        coreml.single(templates.base, adapter, text, package, side=templates.side, precision=precision)
        return Part(weights=(package / WEIGHTS).stat().st_size, program=(package / MODEL).stat().st_size)

    def keep(self, name: str) -> Part:
        raise AssertionError("packages of one concept each go on from none")

    def close(self) -> None:
        """Every package is whole already."""

    def editor(self, name: str) -> Callable[[Tensor], Tensor]:
        return PackedFunction(self._folder / f"{name}.mlpackage", "main")


class OnnxBuilder:
    """`base.bin` and `<concept>.onnx`. since: the folder of the pack to go on from, whose base is taken over."""

    computed = "onnxruntime on a CPU, float32 from fp16 or int8 weights"

    def __init__(self, folder: Path, templates: Templates, *, since: Path | None = None) -> None:
        self._folder, self._templates, self._since = folder, templates, since
        self._template: OnnxTemplate | None = None

    def add(self, name: str, adapter: Adapter, text: Tensor) -> Part:
        adapter = self._templates.cut(adapter)
        self._template = self._templates.onnx(adapter)
        concept = halved(concept_tensors(self._templates.base, adapter, text))
        path = self._folder / f"{name}.onnx"
        self._template.write(path, concept)
        numbers = sum(array.nbytes for array in concept.values())
        return Part(weights=numbers, program=path.stat().st_size - numbers)

    def keep(self, name: str) -> Part:
        import shutil

        assert self._since is not None
        shutil.copyfile(self._since / f"{name}.onnx", self._folder / f"{name}.onnx")
        return Part(weights=0, program=0)

    def close(self) -> None:
        if self._since is not None:
            import shutil

            from e2gan.export.onnx import BASE

            shutil.copyfile(self._since / BASE, self._folder / BASE)
        else:
            assert self._template is not None, "a pack has concepts"
            self._template.write_base(self._folder)

    def editor(self, name: str) -> Callable[[Tensor], Tensor]:
        return OnnxFunction(self._folder / f"{name}.onnx")


def builder(format: Format, folder: Path, templates: Templates, *, since: Path | None = None) -> Builder:
    if format == "coreml":
        return CoreMLBuilder(folder, templates, since=since)
    if format == "onnx":
        return OnnxBuilder(folder, templates, since=since)
    return SingleBuilder(folder, templates)
