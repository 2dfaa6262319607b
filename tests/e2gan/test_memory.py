from __future__ import annotations

import gc

import psutil
import torch

from e2gan.memory import ALIGNED, mapped


def test_copies_are_equal_in_content_and_layout():
    random = torch.Generator().manual_seed(0)
    tensors = {
        "conv": torch.randn(5, 3, 7, 7, generator=random).to(memory_format=torch.channels_last),
        "half": torch.randn(11, 3, generator=random).half(),
        "turned": torch.randn(4, 6, generator=random).T,
        "one": torch.tensor(3, dtype=torch.int64),
    }
    copies = mapped(tensors)
    assert list(copies) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].dtype == tensor.dtype
        assert copies[name].stride() == tensor.stride()
        assert copies[name].data_ptr() % ALIGNED == 0
    tensors["half"].zero_()
    assert copies["half"].count_nonzero()


def test_one_of_them_keeps_them_and_none_keeps_nothing():
    process, size = psutil.Process(), 256 << 20
    before = process.memory_info().rss
    copies = mapped({"large": torch.ones(size // 8), "other": torch.ones(size // 8)})
    kept = copies.pop("other")
    del copies
    gc.collect()
    assert process.memory_info().rss - before > 0.9 * size  # the mapping is whole while any of it is used
    assert kept.sum() == size // 8
    del kept
    gc.collect()
    assert process.memory_info().rss - before < 0.5 * size


def test_nothing_is_mapped_of_nothing():
    assert mapped({}) == {}
