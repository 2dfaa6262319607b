"""A function of a saved Core ML package, run by torch: what a phone computes, without a phone.

coremltools' own loader reads the package back, and every operation's result is rounded to the type that the program
declares for it, fp16 almost everywhere. Sums inside one operation are fp32, as on a GPU; an accelerator that sums in
fp16 is further off than this.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e2gan.export.libraries import coremltools
from e2gan.export.mlpackage import INPUT, OUTPUT, WEIGHTS, function_names, only, read_model


class PackedFunction:
    """Call it with uint8 images `[n, 3, h, w]` of the package's size; uint8 of the same shape comes back.

    Raises:
        ValueError: there is no such package or function, it does not take and give one RGB image, or it holds an
            operation that is not known here.
    """

    def __init__(self, package: Path, name: str) -> None:
        coremltools()
        from coremltools.converters.mil.frontend.milproto.load import load

        model = read_model(package)
        try:
            alone = only(model, name)
        except KeyError:
            names = ", ".join(function_names(model))
            raise ValueError(f"{package} has no function {name!r}; it has {names}") from None
        features = {f.name: f.type.imageType for f in (*alone.description.input, *alone.description.output)}
        rgb = type(alone.description.input[0].type.imageType).RGB
        if features.keys() != {INPUT, OUTPUT} or {image.colorSpace for image in features.values()} != {rgb}:
            raise ValueError(f"{name} in {package} does not take an RGB image and give one")
        self.size = features[INPUT].height, features[INPUT].width
        program = load(alone, alone.specificationVersion, str((package / WEIGHTS).parent))
        self._function = program.functions["main"]
        self._constants: dict[str, Tensor] = {}
        unknown = sorted({op.op_type for op in self._computing()} - _OPERATIONS.keys())
        if unknown:
            raise ValueError(f"{name} in {package} holds the operation {unknown[0]!r}, which nothing here computes")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._run(image[None]) for image in images])

    def _run(self, image: Tensor) -> Tensor:
        values: dict[str, Tensor] = {INPUT: image.float()}
        for op in self._computing():
            given = {name: self._value(held, values) for name, held in op.inputs.items() if held is not None}
            results = _OPERATIONS[op.op_type](given)
            for out, result in zip(op.outputs, results if isinstance(results, tuple) else (results,), strict=True):
                assert tuple(result.shape) == tuple(out.shape), f"{op.op_type} gives {result.shape}, not {out.shape}"
                values[out.name] = result.half().float() if _type(out) == "fp16" else result
        # What an image can hold: the program has rounded already.
        return values[self._function.outputs[0].name].clamp(0, 255).to(torch.uint8)

    def _computing(self) -> list[Any]:
        return [op for op in self._function.operations if op.op_type != "const" and "constexpr" not in op.op_type]

    def _value(self, held: Any, values: dict[str, Tensor]) -> Any:
        """An argument: what was computed, a constant tensor as float32, or a plain setting."""
        if isinstance(held, tuple | list):
            return [self._value(one, values) for one in held]
        if held.name in values:
            return values[held.name]
        if held.name not in self._constants:
            content = held.val if held.op.op_type == "const" else held.op.materialized_val_inference()
            if not (isinstance(content, np.ndarray) and content.dtype.kind == "f"):
                return content.tolist() if isinstance(content, np.ndarray) else content
            self._constants[held.name] = torch.from_numpy(content.astype(np.float32))
        return self._constants[held.name]


def _type(out: Any) -> str:
    from coremltools.converters.mil.mil import types

    name: str = types.builtin_to_string(out.dtype)
    return name


def _conv(i: dict[str, Any]) -> Tensor:
    padding = _padding(i)
    dilations, groups = tuple(i.get("dilations", (1, 1))), int(i.get("groups", 1))
    return F.conv2d(i["x"], i["weight"], i.get("bias"), tuple(i.get("strides", (1, 1))), padding, dilations, groups)


def _conv_transpose(i: dict[str, Any]) -> Tensor:
    strides, padding = tuple(i.get("strides", (1, 1))), _padding(i)
    full = F.conv_transpose2d(i["x"], i["weight"], i.get("bias"), strides, 0, 1, int(i.get("groups", 1)))
    (top, left), shape = padding, i.get("output_shape")
    height, width = shape[2:] if shape is not None else (full.shape[2] - 2 * top, full.shape[3] - 2 * left)
    full = F.pad(full, (0, max(0, left + width - full.shape[3]), 0, max(0, top + height - full.shape[2])))
    return full[:, :, top : top + height, left : left + width]


def _padding(i: dict[str, Any]) -> tuple[int, int]:
    if i.get("pad_type", "valid") == "valid":
        return 0, 0
    top, bottom, left, right = i["pad"]
    assert i["pad_type"] == "custom" and (top, left) == (bottom, right), "the exporter pads alike on both sides"
    return int(top), int(left)


def _pad(i: dict[str, Any]) -> Tensor:
    ends = [int(n) for n in i["pad"]]
    pairs = [ends[k : k + 2] for k in range(0, len(ends), 2)]
    while pairs and pairs[0] == [0, 0]:
        pairs.pop(0)
    mode = i["mode"] if i["mode"] != "replicate" else "replicate"
    return F.pad(i["x"], [n for pair in reversed(pairs) for n in pair], mode=mode)


def _crop(i: dict[str, Any]) -> Tensor:
    (top, bottom), (left, right) = i["crop_height"], i["crop_width"]
    height, width = i["x"].shape[2:]
    cropped: Tensor = i["x"][:, :, top : height - bottom, left : width - right]
    return cropped


def _layer_norm(i: dict[str, Any]) -> Tensor:
    shape = [i["x"].shape[axis] for axis in i["axes"]]
    return F.layer_norm(i["x"], shape, i.get("gamma"), i.get("beta"), float(i["epsilon"]))


def _matmul(i: dict[str, Any]) -> Tensor:
    x, y = (i[name].transpose(-1, -2) if i.get(f"transpose_{name}") else i[name] for name in ("x", "y"))
    product: Tensor = x @ y
    return product


def _average(i: dict[str, Any]) -> Tensor:
    return F.avg_pool2d(i["x"], tuple(i["kernel_sizes"]), tuple(i["strides"]), _padding(i))


def _upsample(i: dict[str, Any]) -> Tensor:
    factors = float(i["scale_factor_height"]), float(i["scale_factor_width"])
    return F.interpolate(i["x"], scale_factor=factors, mode="nearest")


_OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "add": lambda i: i["x"] + i["y"],
    "avg_pool": _average,
    "cast": lambda i: i["x"],  # the rounding to the declared type is the cast
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "crop": _crop,
    "gelu": lambda i: F.gelu(i["x"], approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[i["mode"]]),
    "instance_norm": lambda i: F.instance_norm(i["x"], None, None, i.get("gamma"), i.get("beta"), eps=i["epsilon"]),
    "layer_norm": _layer_norm,
    "linear": lambda i: F.linear(i["x"], i["weight"], i.get("bias")),
    "matmul": _matmul,
    "mul": lambda i: i["x"] * i["y"],
    "pad": _pad,
    "relu": lambda i: F.relu(i["x"]),
    "reshape": lambda i: i["x"].reshape([int(n) for n in i["shape"]]),
    "round": lambda i: torch.round(i["x"]),
    "scaled_dot_product_attention": lambda i: F.scaled_dot_product_attention(i["query"], i["key"], i["value"]),
    "softmax": lambda i: torch.softmax(i["x"], int(i["axis"])),
    "split": lambda i: torch.split(i["x"], [int(n) for n in i["split_sizes"]], int(i["axis"])),
    "sub": lambda i: i["x"] - i["y"],
    "tanh": lambda i: torch.tanh(i["x"]),
    "transpose": lambda i: i["x"].permute([int(n) for n in i["perm"]]),
    "upsample_nearest_neighbor": _upsample,
}
