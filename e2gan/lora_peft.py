"""Adapters in peft's file format.

peft adapts linear layers and convolutions but not transposed convolutions; the missing layer is registered here
(`e2gan.lora_transposed`). That registration is not stored in `adapter_config.json`, so published adapters are read
through `load`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.lora import Adapter, adapter_shapes
from e2gan.lora_attach import peft_config
from e2gan.model import blueprint
from e2gan.ranks import Ranks
from e2gan.weights import Shapes, largest_file, load_weights, save_weights

CONFIG_BYTES = 1 << 20
"""The longest `adapter_config.json`; the paper's adapter has 4 kB of it."""
_PREFIX = "base_model.model."  # peft's name for the adapted model inside its saved keys


def save(adapter: Adapter, *, base: str) -> dict[str, bytes]:
    """The adapter in peft's format, tensors in fp16: `{"adapter_config.json": …, "adapter_model.safetensors": …}`.

    base: digest of the base it fits, written as `base_model_name_or_path`.
    """
    config = peft_config(adapter).to_dict()
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    keep = {key: value for key, value in config.items() if isinstance(value, _JSON)}
    tensors = {
        f"{_PREFIX}{name}.weight": tensor.half().contiguous() for name, tensor in sorted(adapter.tensors.items())
    }
    return {
        "adapter_config.json": (json.dumps(keep, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save_weights(tensors, format="pt"),
    }


def load(files: Mapping[str, bytes], *, base: str, model: GeneratorConfig | None = None) -> Adapter:
    """Read what `save` wrote.

    model: the configuration of the base. With it, tensors of other names or shapes than the configuration's ranks make
    are refused before one is made.

    Raises:
        ValueError: the adapter names another base, or a file is damaged.
    """
    try:
        config = _read_config(files["adapter_config.json"])
        shapes = None if model is None else _shapes(config, model)
        state, _ = load_weights(files["adapter_model.safetensors"], shapes=shapes)
        fits = config["base_model_name_or_path"]
        adapter = _from_peft(config, state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an adapter in peft's format: {error!r}") from error
    if fits != base:
        raise ValueError(f"this adapter fits base {fits!s:.80}, not base {base}: train it again on this base")
    return adapter


def largest_weights(config: bytes, model: GeneratorConfig) -> int:
    """Bytes that no `adapter_model.safetensors` beside this `adapter_config.json` has more of.

    Raises:
        ValueError: the configuration is damaged, or not one for a generator of this shape.
    """
    try:
        return largest_file(_shapes(_read_config(config), model))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an adapter in peft's format: {error!r}") from error


_JSON = (str, int, float, bool, list, dict, type(None))


def _read_config(data: bytes) -> dict[str, Any]:
    if len(data) > CONFIG_BYTES:
        raise ValueError(f"adapter_config.json has {len(data):,} bytes, more than {CONFIG_BYTES:,}")
    try:
        config: dict[str, Any] = json.loads(data)
    except RecursionError as error:
        raise ValueError("adapter_config.json is nested too deeply") from error
    if any(type(rank) is not int for rank in config["rank_pattern"].values()):
        raise ValueError("rank_pattern holds what is no rank")
    return config


def _shapes(config: Mapping[str, Any], model: GeneratorConfig) -> Shapes:
    shapes = adapter_shapes(blueprint(model), config["rank_pattern"])
    return {f"{_PREFIX}{name}.weight": shape for name, shape in shapes.items()}


def _from_peft(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    ranks: Ranks = config["rank_pattern"]
    scale: float = config["lora_alpha"]  # at r = 1
    other = [n for n, rank in ranks.items() if not math.isclose(config["alpha_pattern"][n], scale * rank)]
    if other:
        raise ValueError(f"an adapter has one scale (alpha over rank), {other[0]} has another than {scale}")
    tensors = {
        f"{name}.lora_{side}": state[f"{_PREFIX}{name}.lora_{side}.weight"].float() for name in ranks for side in "AB"
    }
    return Adapter(ranks=dict(ranks), scale=scale, tensors=tensors)
