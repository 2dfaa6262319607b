"""What a worker can say of the device that it works on."""

from __future__ import annotations

from typing import Any


def gpu_used() -> dict[str, Any]:
    """The GPU that this process works on, and the largest share of its memory that was taken since the last call, as
    fields of `farm.events.Event`; nothing where it works on a CPU."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    share = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties().total_memory
    torch.cuda.reset_peak_memory_stats()
    return {"device": torch.cuda.get_device_name(), "device_memory": round(share, 3)}
