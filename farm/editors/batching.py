"""Batches as large as memory allows: measured on a first image, halved when that was too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from farm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

FILL = 0.8
"""The share of what is free that a batch may take: other sizes and later steps need not cost what was measured."""


class Memory(Protocol):
    """What a device tells about its memory, in bytes."""

    def start(self) -> None:
        """Begin to watch for the peak."""
        ...

    def peak(self) -> int:
        """The most taken at any time since `start`, above what was taken then."""
        ...

    def free(self) -> int:
        """What could still be taken."""
        ...


class CudaMemory:
    """A CUDA device's memory, as PyTorch's allocator counts it."""

    def __init__(self, device: int) -> None:
        self._device, self._before = device, 0

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self._device) - self._before

    def free(self) -> int:
        import torch

        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + held


class Batches:
    """Runs items in batches that fit in memory, and remembers from one call to the next what did.

    most: items at once at most; when left out, what fits on the devices of `memories` going by the first item, and one
    at a time where there are none: on a CPU a batch is no faster. An item's cost is taken to be in proportion to its
    pixels.
    """

    def __init__(self, most: int | None, memories: Sequence[Memory] = ()) -> None:
        self._most = most
        self._memories = memories
        self._pixels: float | None = None
        """How many pixels fit in memory at once, when that is known."""

    def run(
        self, items: Sequence[Item], pixels: int, work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result]:
        """The results of `work` on all items, in order. pixels: of one item.

        Raises:
            UserError: not even one item fits in memory.
        """
        results: list[Result] = []
        while len(results) < len(items):
            left = len(items) - len(results)
            batches = -(-left // self._limit(pixels))
            size = -(-left // batches)  # of equal size: 30 and 30 rather than 50 and 10
            batch = items[len(results) : len(results) + size]
            measures = self._most is None and self._pixels is None and bool(self._memories)
            if measures:
                for memory in self._memories:
                    memory.start()
            done = _try(work, batch)
            if done is not None:
                results += done
                if measures:
                    fitting = [FILL * memory.free() / max(memory.peak(), 1) for memory in self._memories]
                    self._pixels = max(1.0, min(fitting)) * pixels
            elif size > 1:
                self._pixels = size // 2 * pixels
                _release()
            else:
                raise UserError(
                    "editor.batch_size is down to 1 and one image does not fit in memory; lower editor.side, set "
                    "editor.cpu_offload: model or editor.vae_tiling: true, or take editor.dtype: float16."
                )
        return results

    def _limit(self, pixels: int) -> int:
        if self._pixels is None:
            return self._most or 1
        fitting = max(1, int(self._pixels // pixels))
        return fitting if self._most is None else min(self._most, fitting)


def _try(work: Callable[[Sequence[Item]], Sequence[Result]], batch: Sequence[Item]) -> Sequence[Result] | None:
    """`work(batch)`, or None when memory ran out. By then the exception is gone, and with it what its frames held."""
    try:
        return work(batch)
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        if not out_of_memory(error):
            raise
        return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch's means that a GPU or the machine has no memory left."""
    import torch

    texts = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _release() -> None:
    """Give the allocator's spare blocks back: they may be of sizes that the next batch cannot use."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
