import itertools
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2gan.weights import HEADER_BYTES, check_shapes, largest_file, load_weights, read_header, save_weights

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7), "half": torch.ones(3).half()}
FILE = save_weights(TENSORS, made="here", note="ü")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])
names = st.text(max_size=8).filter(lambda name: name not in ("__metadata__", "sha256", "tensors"))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.tuples(st.lists(st.integers(0, 3), max_size=3), dtypes), max_size=4),
    st.dictionaries(names, st.text(max_size=8), max_size=3),
)
def test_tensors_and_metadata_come_back(wanted: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors = {name: (10 * torch.rand(shape)).to(dtype) for name, (shape, dtype) in wanted.items()}
    data = save_weights(tensors, **metadata)
    back, read = load_weights(data, sealed=True)
    assert_same(back, tensors)
    assert read == metadata
    assert save_weights(back, **read) == data
    assert_same(safetensors.torch.load(data), tensors)


def test_the_same_tensors_give_the_same_bytes_in_any_order() -> None:
    metadata = {"note": "ü", "made": "here"}
    for order in itertools.permutations(TENSORS):
        assert save_weights({name: TENSORS[name] for name in order}, **metadata) == FILE
    changed = {**TENSORS, "a": torch.tensor(8)}
    assert len({FILE, save_weights(changed, **metadata), save_weights(TENSORS, made="there", note="ü")}) == 3


def test_views_and_parameters_are_saved_as_they_look() -> None:
    weight = torch.nn.Parameter(torch.arange(24.0).view(1, 2, 3, 4))
    views = {"t": weight.transpose(1, 2), "last": weight.to(memory_format=torch.channels_last), "cut": weight[:, 1:]}
    assert_same(load_weights(save_weights(views))[0], views)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "by": "others"}])
def test_files_of_safetensors_itself_are_read(metadata: dict[str, str] | None) -> None:
    data = safetensors.torch.save(TENSORS, metadata)
    tensors, read = load_weights(data)
    assert_same(tensors, TENSORS)
    assert read == (metadata or {})
    with pytest.raises(ValueError, match="no sha256"):
        load_weights(data, sealed=True)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(FILE) - 1))
def test_truncated_files_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(FILE[:length])


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, change: int) -> None:
    changed = bytearray(FILE)
    changed[place] ^= change
    with pytest.raises(ValueError, match=r"not a whole safetensors file|changed after they were saved"):
        load_weights(bytes(changed), sealed=True)
    start = FILE.index(b'"sha256"')
    if not start < place < start + 7:  # under another name the digest looks like a foreign file's metadata
        with pytest.raises(ValueError, match=r"not a whole safetensors file|changed after they were saved"):
            load_weights(bytes(changed))


@pytest.mark.parametrize("data", [b"", b"weights", bytes(8), bytes(64), b"\xff" * 64, FILE + b"\0", FILE[8:]])
def test_what_is_no_safetensors_file(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(data)


SHAPES = {"b": (2, 3), "half": (3,), "one": ()}
EXPECTED = {"b": torch.zeros(2, 3), "half": torch.ones(3).half(), "one": torch.tensor(1.0)}


def written(header: dict[str, Any] | bytes, body: bytes = bytes(64), length: int | None = None) -> bytes:
    """A file with any header before any body; its header may claim another length than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def three(b: Any = (0, 24), half: Any = (24, 30), one: Any = (30, 34)) -> dict[str, Any]:
    """A header of the three tensors, each at its place."""
    return {"b": entry(offsets=b), "half": entry("F16", (3,), half), "one": entry("F32", (), one)}


OTHERS = {name: place for name, place in three().items() if name != "b"}
MANY = {f"x{n}": entry("F32", (0,), (0, 0)) for n in range(10_000)}
BODY = bytes(34)
HOSTILE = {
    "a header of 2^60 bytes": written({"b": entry(), **OTHERS}, BODY, 2**60),
    "a header of all bits": written({"b": entry(), **OTHERS}, BODY, 2**64 - 1),
    "a header longer than any": written({"b": entry(), "__metadata__": {"x": "y" * HEADER_BYTES}, **OTHERS}, BODY),
    "a huge shape": written({"b": entry(shape=(2**40, 2**20)), **OTHERS}, BODY),
    "a shape that overflows": written({"b": entry(shape=(2**63, 2)), **OTHERS}, BODY),
    "a shape of nothing": written({"b": entry(shape=(0, 2**40), offsets=(0, 0)), **OTHERS}, BODY),
    "a negative shape": written({"b": entry(shape=(-2, -3)), **OTHERS}, BODY),
    "a shape that is a number": written({"b": entry(shape=6), **OTHERS}, BODY),
    "another shape of that size": written({"b": entry(shape=(3, 2)), **OTHERS}, BODY),
    "a shape of true and floats": written({"one": entry(shape=(True,), offsets=(0, 4))}, bytes(4)),
    "another type": written({"b": entry("F64", offsets=(0, 48)), **OTHERS}, BODY),
    "an integer type": written({"b": entry("I32"), **OTHERS}, BODY),
    "a type that is none": written({"b": entry("F31"), **OTHERS}, BODY),
    "a type that is a list": written({"b": entry(["F32"]), **OTHERS}, BODY),
    "an entry that is none": written({"b": [1], **OTHERS}, BODY),
    "a missing tensor": written(OTHERS, BODY),
    "one tensor more": written({"b": entry(), **OTHERS, "more": entry("F32", (), (34, 38))}, bytes(38)),
    "ten thousand more": written({**three(), **MANY}, BODY),
    "another name": written({"B": entry(), **OTHERS}, BODY),
    "a name twice": written(json.dumps(three()).encode()[:-1] + b", " + json.dumps({"b": entry()}).encode()[1:], BODY),
    "overlapping tensors": written(three(half=(20, 26), one=(26, 30)), bytes(30)),
    "tensors past the end": written({"b": entry(offsets=(2**40, 2**40 + 24)), **OTHERS}, BODY),
    "offsets the wrong way": written({"b": entry(offsets=(24, 0)), **OTHERS}, BODY),
    "a hole": written(three(b=(4, 28), half=(28, 34), one=(34, 38)), bytes(38)),
    "a body that is longer": written({"b": entry(), **OTHERS}, bytes(35)),
    "a header that is a list": written(b"[]", BODY),
    "a header nested deeply": written(b'{"b":' * 100_000, BODY),
    "lists nested deeply": written(b"[" * 200_000, BODY),
    "a number of many digits": written(b'{"b": ' + b"9" * 10_000 + b"}", BODY),
    "no text": written(b"\xff\xfe{}", BODY),
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_other_weights_are_refused(data: bytes) -> None:
    with pytest.raises(
        ValueError, match=r"^(other weights than were expected|not a whole safetensors file): "
    ) as caught:
        load_weights(data, shapes=SHAPES)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_what_the_header_gives_away_is_refused_before_a_tensor_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    at_places = (
        "overlapping tensors",
        "tensors past the end",
        "offsets the wrong way",
        "a hole",
        "a body that is longer",
    )
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("the tensors were made"))
    for name, data in HOSTILE.items():
        if name not in at_places:  # which safetensors looks at first of all
            with pytest.raises(ValueError, match=r"^(other weights|not a whole)"):
                load_weights(data, shapes=SHAPES)


def test_the_weights_that_were_expected_are_read() -> None:
    for data in (save_weights(EXPECTED, note="ü"), safetensors.torch.save(EXPECTED)):
        assert_same(load_weights(data, shapes=SHAPES)[0], EXPECTED)
        assert len(data) < largest_file(SHAPES)
        check_shapes(data, SHAPES)
    with pytest.raises(ValueError, match="'half' is F16"):
        load_weights(data, shapes=SHAPES, dtypes=("F32",))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in EXPECTED.items()}
    assert_same(load_weights(written(three(), BODY), shapes=SHAPES)[0], zeros)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_are_weights_or_refused(data: bytes, length: int) -> None:
    for file in (data, length.to_bytes(8, "little") + data, len(data).to_bytes(8, "little") + data):
        for call in (lambda f=file: load_weights(f, shapes=SHAPES), lambda f=file: read_header(f)):
            try:
                call()
            except ValueError as error:
                assert str(error).startswith(("other weights", "not a whole"))
