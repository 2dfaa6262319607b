"""What fits is known before anything is converted: no pack comes out larger than was counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from e2gan.config import GeneratorConfig
from e2gan.export.budget import LADDER, ONNX_LADDER, Shape, fit, sizes
from e2gan.export.builders import Templates, builder
from e2gan.lora import new_adapter, searched_ranks
from e2gan.model import build_generator

CONCEPTS = 3
STEPS = [("coreml", shape) for shape in (*LADDER, Shape(precision="int8"))]
STEPS += [("onnx", shape) for shape in ONNX_LADDER]


@pytest.fixture(scope="module")
def base() -> Any:
    return build_generator(GeneratorConfig(channels=16), seed=0).eval()


@pytest.mark.parametrize(("format", "shape"), STEPS, ids=lambda value: str(value).replace("Shape", ""))
def test_no_pack_is_larger_than_was_counted(base: Any, format: Any, shape: Shape, tmp_path: Path) -> None:
    """Whatever the step, and with the longest names that concepts have."""
    ranks = searched_ranks(base)
    pack = builder(format, tmp_path, Templates(base, side=32, shape=shape))
    for number in range(CONCEPTS):
        text = torch.randn(base.config.text_tokens, base.config.text_width)
        pack.add(f"{'c' * 78}-{number}", new_adapter(base, ranks, seed=number), text)
    pack.close()
    came_out = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    counted = sizes(base, ranks, shape).total(CONCEPTS)
    assert 0.8 * counted < came_out <= counted


def test_the_first_step_that_fits_is_taken(base: Any) -> None:
    ranks = searched_ranks(base)
    wanted = [sizes(base, ranks, shape).total(30) for shape in LADDER]
    assert wanted == sorted(wanted, reverse=True)
    for shape, budget in zip(LADDER, wanted, strict=True):
        assert fit(base, ranks, concepts=30, budget=budget) == (shape, 30)
    shape, many = fit(base, ranks, concepts=30, budget=wanted[-1] - 1)
    assert shape == LADDER[1] and many < 30
    assert sizes(base, ranks, shape).total(many) < wanted[-1] <= sizes(base, ranks, shape).total(many + 1)
    with pytest.raises(ValueError, match="a pack of one concept takes"):
        fit(base, ranks, concepts=30, budget=1000)
