from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from farm.editors.batching import Batches, out_of_memory
from farm.errors import UserError


class Device:
    """A device with `capacity` bytes of which an item takes `cost` a pixel and a batch `fixed` more.

    It is what `Batches` measures, and runs the work that `Batches` sizes: it adds one to every item.
    """

    def __init__(self, capacity: float, cost: float, fixed: float = 0) -> None:
        self.capacity, self.cost, self.fixed = capacity, cost, fixed
        self.tried: list[int] = []
        self.done: list[int] = []
        self.most = 0.0

    def start(self) -> None:
        self.most = 0

    def peak(self) -> int:
        return int(self.most)

    def free(self) -> int:
        return int(self.capacity)

    def work(self, pixels: int, batch: Sequence[int]) -> list[int]:
        self.tried.append(len(batch))
        needed = self.fixed + self.cost * pixels * len(batch)
        if needed > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.most = max(self.most, needed)
        self.done.append(len(batch))
        return [item + 1 for item in batch]


def run(batches: Batches, device: Device, count: int, pixels: int = 1) -> list[int]:
    items = list(range(count))
    results = batches.run(items, pixels, lambda batch: device.work(pixels, batch))
    assert results == [item + 1 for item in items]
    return results


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 60),
    most=st.none() | st.integers(1, 70),
    fit=st.integers(1, 80),
    fixed=st.integers(0, 300),
    measured=st.booleans(),
)
@example(count=60, most=None, fit=1, fixed=0, measured=True)
def test_every_item_is_done_once_and_in_order(
    count: int, most: int | None, fit: int, fixed: int, measured: bool
) -> None:
    device = Device(capacity=100 * fit + fixed, cost=100, fixed=fixed)
    run(Batches(most, [device] if measured else []), device, count)
    assert sum(device.done) == count
    assert max(device.done, default=0) <= min(fit, most or 80)


def test_the_first_item_tells_how_many_fit() -> None:
    device = Device(capacity=1000, cost=10)  # 100 items, of which 80 % are risked
    batches = Batches(None, [device])
    run(batches, device, 161)
    assert device.tried == [1, 80, 80]
    run(batches, device, 90)
    assert device.tried[3:] == [45, 45]


def test_images_of_another_size_are_counted_in_pixels() -> None:
    device = Device(capacity=1000, cost=1)
    batches = Batches(None, [device])
    run(batches, device, 1, pixels=10)
    run(batches, device, 80, pixels=20)
    assert device.tried == [1, 40, 40]


def test_the_fullest_device_decides() -> None:
    devices = [Device(capacity=1000, cost=10), Device(capacity=400, cost=10)]
    batches = Batches(None, devices)

    def work(batch: Sequence[int]) -> list[int]:
        first, _ = (device.work(1, batch) for device in devices)
        return first

    assert batches.run(range(33), 1, work) == list(range(1, 34))
    assert devices[0].tried == [1, 32]


def test_running_out_halves_and_is_remembered() -> None:
    device = Device(capacity=30, cost=10)
    batches = Batches(16)
    run(batches, device, 16)
    assert device.tried == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    device.tried.clear()
    run(batches, device, 4)
    assert device.tried == [2, 2]


def test_a_measure_that_promised_too_much_is_corrected() -> None:
    device = Device(capacity=1000, cost=10)
    batches = Batches(None, [device])
    run(batches, device, 1)
    device.capacity = 450  # something else came to take memory
    run(batches, device, 80)
    assert device.tried == [1, 80, 40, 40]


def test_a_device_that_fits_none_is_told() -> None:
    for batches in (Batches(4), Batches(None), Batches(None, [Device(1, 1)])):
        with pytest.raises(UserError) as caught:
            run(batches, Device(capacity=5, cost=10), 4)
        text = str(caught.value)
        for key in ("batch_size", "side", "cpu_offload", "vae_tiling", "dtype"):
            assert f"editor.{key}" in text
        assert text.endswith(".")
        assert text.count(". ") == 0


def test_without_a_device_to_measure_one_at_a_time() -> None:
    device = Device(capacity=1000, cost=1)
    run(Batches(None), device, 3)
    assert device.tried == [1, 1, 1]


def test_what_the_failed_batch_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(batch: Sequence[int]) -> list[int]:
        assert all(tensor() is None for tensor in held)
        tensor = torch.zeros(len(batch))
        held.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return list(batch)

    assert Batches(4).run([1, 2, 3, 4], 1, work) == [1, 2, 3, 4]
    assert len(held) == 2 + 4


def test_the_cpus_own_lack_of_memory_counts() -> None:
    def work(batch: Sequence[int]) -> list[int]:
        if len(batch) > 1:
            torch.empty(2**60, dtype=torch.uint8)
        return list(batch)

    assert Batches(8).run([1, 2, 3], 1, work) == [1, 2, 3]


def test_other_errors_pass_through() -> None:
    def work(batch: Sequence[int]) -> list[int]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Batches(4).run([1, 2], 1, work)
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_is_filled_but_not_overfilled() -> None:
    from farm.editors.batching import CudaMemory

    device = torch.cuda.current_device()
    each = torch.cuda.mem_get_info(device)[0] // 50
    sizes: list[int] = []

    def work(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        torch.empty(each * len(batch), dtype=torch.uint8, device="cuda")
        return list(batch)

    items = list(range(101))
    assert Batches(None, [CudaMemory(device)]).run(items, 1, work) == items
    assert sizes[0] == 1
    assert 30 <= max(sizes) <= 42
    assert Batches(101).run(items, 1, work) == items  # one batch of them all does not fit
