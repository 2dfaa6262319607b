"""ONNX models of a tiny generator, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import mixed_ranks, noise, tiny, trained

from e2gan.export.coreml import halved
from e2gan.export.libraries import onnx
from e2gan.export.onnx import BASE, OnnxFunction, OnnxTemplate
from e2gan.export.parity import parity, server_edits
from e2gan.export.phone import concept_tensors

SIDE = 16
PHOTOS = (noise(2, 3, SIDE, SIDE, seed=5) * 60 + 128).clamp(0, 255).byte()


def concept(seed: int) -> Any:
    return trained(mixed_ranks(), seed=seed, scale=0.1 * seed), noise(3, 5, seed=seed)


@pytest.mark.parametrize(("precision", "least"), [("fp16", 50), ("int8", 30)])
def test_models_share_their_base(tmp_path: Path, precision: Any, least: float) -> None:
    template = OnnxTemplate(tiny(), mixed_ranks(), side=SIDE, precision=precision)
    template.write_base(tmp_path)
    template.write_open(tmp_path / "open.onnx")
    edits = {}
    for seed in (1, 2):
        template.write(tmp_path / f"{seed}.onnx", halved(concept_tensors(tiny(), *concept(seed))))
        edits[seed] = OnnxFunction(tmp_path / f"{seed}.onnx")(PHOTOS)
    taking = OnnxFunction(tmp_path / "open.onnx")
    for seed, found in edits.items():
        expected = server_edits(tiny(), *concept(seed), PHOTOS)
        assert parity(expected, found).lowest > least
        tensors = halved(concept_tensors(tiny(), *concept(seed)))
        assert parity(found, taking(PHOTOS, tensors)).largest <= 1  # tensors as inputs give the same
    assert parity(edits[1], edits[2]).lowest < 40
    onnx().checker.check_model(str(tmp_path / "1.onnx"))
    held = [t for t in onnx().load(tmp_path / "1.onnx", load_external_data=False).graph.initializer if t.external_data]
    bits = {"fp16": 2, "int8": 1}[precision]
    numbers = sum(p.numel() for p in tiny().parameters() if p.numel() >= 1024)
    assert bits * numbers <= (tmp_path / BASE).stat().st_size < bits * numbers + 64 * len(held) + 1
