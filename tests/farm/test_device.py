from __future__ import annotations

import types

import pytest
import torch

from farm.device import gpu_used


def test_a_cpu_says_nothing() -> None:
    assert gpu_used() == {}


def test_a_gpu_says_its_name_and_the_peak_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: what it answers is stood in for."""
    peak = [40, 10]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.pop(0))
    assert [gpu_used(), gpu_used()] == [
        {"device": "NVIDIA H200", "device_memory": 0.5},
        {"device": "NVIDIA H200", "device_memory": 0.125},
    ]
