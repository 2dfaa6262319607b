"""Core ML packages of a tiny generator, read back and run: sound ones pass, every way of spoiling one is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import TINY, mixed_ranks, noise, tiny, trained

from e2gan.export.builders import function_name
from e2gan.export.coreml import _converted, halved, single, template
from e2gan.export.libraries import coremltools, quietly
from e2gan.export.mil import PackedFunction
from e2gan.export.mlpackage import (
    MODEL,
    WEIGHTS,
    PackWriter,
    Template,
    function_names,
    large_values,
    operations,
    read_model,
    write_model,
)
from e2gan.export.parity import LIMITS, Judged, judge, server_edits
from e2gan.export.phone import PhoneGenerator, concept_tensors
from e2gan.model import build_generator

SIDE = 16
RANKS = mixed_ranks()
CONCEPTS = {"night": 1, "sepia": 2}
"""Seeds of adapters and prompts."""
PHOTOS = (noise(2, 3, SIDE, SIDE, seed=5) * 60 + 128).clamp(0, 255).byte()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def concept(seed: int) -> Any:
    return trained(RANKS, seed=seed, scale=0.1 * seed), noise(3, 5, seed=seed)


def tensors(seed: int) -> Any:
    return halved(concept_tensors(tiny(), *concept(seed)))


def judged(package: Path, name: str, *, seed: int, precision: str = "fp16") -> Judged:
    expected = server_edits(tiny(), *concept(seed), PHOTOS)
    return judge(PackedFunction(package, name), expected, PHOTOS, limit=LIMITS[precision])


@pytest.fixture(scope="module")
def converted() -> Template:
    return template(tiny(), RANKS, side=SIDE)


@pytest.fixture(scope="module")
def pack(converted: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("pack") / "pack.mlpackage"
    writer = PackWriter(package)
    for name, seed in CONCEPTS.items():
        writer.add(name, converted, tensors(seed))
    writer.close()
    return package


def copy(package: Path, target: Path) -> Path:
    shutil.copytree(package, target / package.name)
    return target / package.name


def test_every_function_edits_as_the_server_does(pack: Path) -> None:
    assert function_names(read_model(pack)) == list(CONCEPTS)
    for name, seed in CONCEPTS.items():
        one = judged(pack, name, seed=seed)
        assert one.reason is None and one.parity.lowest > 45


def test_it_is_what_coremltools_makes_of_the_same_concepts(pack: Path, tmp_path: Path) -> None:
    """Converted one by one and joined by `save_multifunction`: the same operations, numbers and pictures."""
    tools = coremltools()
    with quietly():
        joined = tools.utils.MultiFunctionDescriptor()
        for name, seed in CONCEPTS.items():
            network = PhoneGenerator(tiny(), concept_tensors(tiny(), *concept(seed)))
            _converted(network, SIDE, tools.target.iOS18).save(str(tmp_path / f"{name}.mlpackage"))
            joined.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
        joined.default_function_name = next(iter(CONCEPTS))
        tools.utils.save_multifunction(joined, str(tmp_path / "theirs.mlpackage"))
    ours, theirs = read_model(pack), read_model(tmp_path / "theirs.mlpackage")
    assert ours.specificationVersion == theirs.specificationVersion
    assert ours.description.defaultFunctionName == theirs.description.defaultFunctionName
    for name in CONCEPTS:
        a, b = (model.mlProgram.functions[name] for model in (ours, theirs))
        assert a.opset == b.opset and list(a.inputs) == list(b.inputs)
        computing = [[o.type for o in operations(function) if o.type != "const"] for function in (a, b)]
        assert computing[0] == computing[1]
        edits = [PackedFunction(package, name)(PHOTOS) for package in (pack, tmp_path / "theirs.mlpackage")]
        assert torch.equal(*edits)
    described = [{d.name: d for d in model.description.functions} for model in (ours, theirs)]
    assert described[0] == described[1]
    # Its base is there once: two concepts take less than one more copy of it would.
    places = [{v.blobFileValue.offset for n in CONCEPTS for v in large_values(m.mlProgram.functions[n])}
              for m in (ours, theirs)]  # fmt: skip
    assert len(places[0]) <= len(places[1])
    assert (pack / WEIGHTS).stat().st_size <= (tmp_path / "theirs.mlpackage" / WEIGHTS).stat().st_size
    assert (pack / MODEL).stat().st_size < 0.6 * (tmp_path / "theirs.mlpackage" / MODEL).stat().st_size


def test_the_same_concepts_give_the_same_bytes(pack: Path, converted: Template, tmp_path: Path) -> None:
    again = PackWriter(tmp_path / "again.mlpackage")
    for name, seed in CONCEPTS.items():
        again.add(name, converted, tensors(seed))
    again.close()
    for file in (MODEL, WEIGHTS, "Manifest.json"):
        assert (pack / file).read_bytes() == (tmp_path / "again.mlpackage" / file).read_bytes()


def test_names_that_a_compiled_package_can_hold(pack: Path) -> None:
    """Those that the converter's own rule for names leaves alone, values' too."""
    from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

    concepts = ("pop-art", "3d-render", "night", "vincent-van-gogh-style")
    function = read_model(pack).mlProgram.functions["night"]
    values = [output.name for operation in operations(function) for output in operation.outputs]
    for name in (*map(function_name, concepts), *values):
        assert NameSanitizer().sanitize_name(name) == name
    assert len({*map(function_name, concepts)}) == len(concepts)
    assert NameSanitizer().sanitize_name("pop-art") != "pop-art"


# Sabotage


def swapped_functions(model: Any) -> None:
    functions = model.mlProgram.functions
    kept = type(functions["night"])()
    kept.CopyFrom(functions["night"])
    functions["night"].CopyFrom(functions["sepia"])
    functions["sepia"].CopyFrom(kept)


def skipping(model: Any, *outputs: str) -> None:
    """Take operations out of `night`: whoever reads what they give reads what they were given."""
    ours = operations(model.mlProgram.functions["night"])
    given = {o.outputs[0].name: o.inputs["x"].arguments[0].name for o in ours if o.outputs[0].name in outputs}
    for operation in ours:
        for arguments in operation.inputs.values():
            for binding in arguments.arguments:
                while binding.name in given:
                    binding.name = given[binding.name]


def computed(model: Any, *kinds: str) -> list[str]:
    return [o.outputs[0].name for o in operations(model.mlProgram.functions["night"]) if o.type in kinds]


def without_a_norm(model: Any) -> None:
    skipping(model, computed(model, "instance_norm")[-1])  # the head has its scale from it


def without_the_outputs_range(model: Any) -> None:
    """Pictures come out in -1..1."""
    tail = operations(model.mlProgram.functions["night"])
    place = next(n for n, o in enumerate(tail) if o.type == "tanh")
    skipping(model, *(o.outputs[0].name for o in tail[place:] if o.type in ("add", "mul")))


@pytest.mark.parametrize("spoil", [swapped_functions, without_a_norm, without_the_outputs_range])
def test_a_spoilt_program_fails(pack: Path, tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    package = copy(pack, tmp_path)
    model = read_model(package)
    spoil(model)
    write_model(package, model)
    one = judged(package, "night", seed=CONCEPTS["night"])
    assert one.reason is not None and "at least 40 are asked for" in one.reason


def test_the_inputs_range_is_no_matter(pack: Path, tmp_path: Path) -> None:
    """The norm after the first convolution takes away what scale and shift the photo had: leaving them out is no harm,
    and so nothing that a certificate could find."""
    package = copy(pack, tmp_path)
    model = read_model(package)
    skipping(model, computed(model, "mul")[0], computed(model, "sub")[0])
    write_model(package, model)
    assert judged(package, "night", seed=1).reason is None


def test_swapped_colours_are_refused(pack: Path, tmp_path: Path) -> None:
    package = copy(pack, tmp_path)
    model = read_model(package)
    image = model.description.functions[0].input[0].type.imageType
    image.colorSpace = type(image).BGR
    write_model(package, model)
    with pytest.raises(ValueError, match="does not take an RGB image and give one"):
        PackedFunction(package, "night")


def test_a_swapped_adapter_or_text_fails(converted: Template, tmp_path: Path) -> None:
    mixed = {n: (tensors(2) if n.endswith((".keys", ".values")) else tensors(1))[n] for n in tensors(1)}
    writer = PackWriter(tmp_path / "pack.mlpackage")
    writer.add("other-adapter", converted, tensors(2))
    writer.add("other-text", converted, mixed)
    writer.close()
    for name in ("other-adapter", "other-text"):
        assert judged(tmp_path / "pack.mlpackage", name, seed=1).reason is not None, name


def test_spoilt_weights_fail(pack: Path, tmp_path: Path) -> None:
    package = copy(pack, tmp_path)
    data = bytearray((package / WEIGHTS).read_bytes())
    values = large_values(read_model(package).mlProgram.functions["night"])
    place = max(v.blobFileValue.offset for v in values) + 64  # past what describes the last one
    data[place : place + 64] = bytes(64)
    (package / WEIGHTS).write_bytes(data)
    assert judged(package, "night", seed=1).reason or judged(package, "sepia", seed=2).reason


# Updates


def test_an_update_only_adds(pack: Path, converted: Template, tmp_path: Path) -> None:
    package = tmp_path / "new.mlpackage"
    writer = PackWriter(package, since=pack)
    kept, added = writer.keep("sepia"), writer.add("fog", converted, tensors(3))
    writer.close()
    old, new = (pack / WEIGHTS).read_bytes(), (package / WEIGHTS).read_bytes()
    # The first bytes of the file count its constants.
    assert new[64 : len(old)] == old[64:] and len(new) - len(old) == added.weights < len(old) / 2
    assert kept.weights == 0 and function_names(read_model(package)) == ["sepia", "fog"]
    for name, seed in (("sepia", 2), ("fog", 3)):
        assert judged(package, name, seed=seed).reason is None


# Other packages


def test_a_single_concept_for_older_phones(tmp_path: Path) -> None:
    package = tmp_path / "night.mlpackage"
    single(tiny(), *concept(1), package, side=SIDE, precision="fp16")
    assert read_model(package).specificationVersion == 7  # iOS 16
    assert function_names(read_model(package)) == ["main"]
    assert judged(package, "main", seed=1).reason is None
    assert sorted(p.name for p in package.iterdir()) == ["Data", "Manifest.json"]


def test_another_generator(tmp_path: Path) -> None:
    """Two transformer blocks that pool, without text: other operations, the same pictures."""
    config = replace(TINY, transformer_sampling="pool", transformer_blocks=2, cross_attention=False)
    base, package = build_generator(config, seed=1), tmp_path / "base.mlpackage"
    single(base, None, noise(3, 5), package, side=SIDE, precision="fp16")
    expected = server_edits(base, None, noise(3, 5), PHOTOS)
    assert judge(PackedFunction(package, "main"), expected, PHOTOS, limit=40).reason is None


@pytest.mark.parametrize("precision", ["int8", "6bit"])
def test_a_base_in_fewer_bits(pack: Path, tmp_path: Path, precision: Any) -> None:
    package = tmp_path / "pack.mlpackage"
    writer = PackWriter(package)
    writer.add("night", template(tiny(), RANKS, side=SIDE, precision=precision), tensors(1))
    writer.close()
    assert (package / WEIGHTS).stat().st_size < 0.8 * (pack / WEIGHTS).stat().st_size
    one = judged(package, "night", seed=1, precision=precision)
    whole = judged(pack, "night", seed=1)
    assert one.parity.lowest < whole.parity.lowest  # it costs something, and is still the concept
    assert one.parity.lowest > 20


def test_what_is_no_package(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a Core ML package"):
        PackedFunction(tmp_path, "night")
    with pytest.raises(ValueError, match=r"has no function 'fog'; it has night, sepia$"):
        PackedFunction(pack, "fog")
    package = copy(pack, tmp_path)
    model = read_model(package)
    for operation in operations(model.mlProgram.functions["night"]):
        if operation.type == "relu":
            operation.type = "softsign"
    write_model(package, model)
    with pytest.raises(ValueError, match="holds the operation 'softsign', which nothing here computes"):
        PackedFunction(package, "night")


def test_sides_and_ranks_that_will_not_do() -> None:
    with pytest.raises(ValueError, match="multiples of 8 and at least 16, not 20x20"):
        template(tiny(), RANKS, side=20)
    with pytest.raises(ValueError, match="'residual' is not a crucial layer"):
        template(tiny(), {"residual": 1}, side=SIDE)
