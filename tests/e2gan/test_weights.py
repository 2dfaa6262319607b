import itertools
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2gan.weights import load_weights, save_weights

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
