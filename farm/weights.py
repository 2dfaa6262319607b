"""Weights out of a store. What a file may hold is known before it is read, from the configuration of the base and the
adapter's ranks: another one is refused by what its manifest lists or by its header, and no tensor is made of it.
"""

from __future__ import annotations

from collections.abc import Collection

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.lora import Adapter
from e2gan.lora_peft import CONFIG_BYTES, largest_weights, load
from e2gan.model import generator_shapes
from e2gan.weights import FLOATS, Shapes, largest_file, load_weights
from farm.artifacts import Artifact, need_artifact
from farm.errors import IntegrityError, UserError
from farm.signing import NOBODY, Keys
from farm.store import Store, where
from farm.threads import beside

_MODEL = TypeAdapter(GeneratorConfig)


def read_base(store: Store, path: str, keys: Keys = NOBODY) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """Configuration and weights of the base at `bases/<digest>`.

    Raises:
        IntegrityError: it is not there or damaged, holds other weights than its configuration has, or none of the keys
            signed it.
    """
    return base_of(need_artifact(store, path, keys))


def base_of(artifact: Artifact) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """Configuration and weights of a base. IntegrityError as `read_base`."""
    try:
        config = _MODEL.validate_json(artifact.read("config.json", CONFIG_BYTES), strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise _refused(artifact, "config.json", first["msg"]) from error
    return config, read_weights(artifact, "generator.safetensors", generator_shapes(config), dtypes=("F32",))


def read_adapter(
    store: Store, path: str, base: str, model: GeneratorConfig, keys: Keys = NOBODY
) -> tuple[Adapter, Tensor]:
    """The adapter at `adapters/<concept>/<digest>` and its prompt's embedding `[text_tokens, text_width]`.

    base, model: digest and configuration of the base it has to fit.

    Raises:
        IntegrityError: it is not there, a file is damaged, or none of the keys signed it.
        UserError: it does not fit the base.
    """
    return adapter_of(need_artifact(store, path, keys), base, model)


def adapter_of(artifact: Artifact, base: str, model: GeneratorConfig) -> tuple[Adapter, Tensor]:
    """An adapter and its prompt's embedding. IntegrityError and UserError as `read_adapter`."""
    shapes = {"text": (model.text_tokens, model.text_width)}
    limits = {"text.safetensors": largest_file(shapes), "adapter_config.json": CONFIG_BYTES}
    text, config = beside(lambda name: artifact.read(name, limits[name]), [*limits], artifact.store.at_once)
    embedding = _tensors(artifact, "text.safetensors", text, shapes, ("F32",))["text"]
    try:
        weights = artifact.read("adapter_model.safetensors", largest_weights(config, model))
        files = {"adapter_config.json": config, "adapter_model.safetensors": weights}
        return load(files, base=base, model=model), embedding
    except ValueError as error:
        raise UserError(f"{where(artifact.store, artifact.manifest.path)}: {error}.") from error


def read_weights(
    artifact: Artifact, name: str, shapes: Shapes, *, dtypes: Collection[str] = tuple(FLOATS)
) -> dict[str, Tensor]:
    """The tensors of an artifact's file, which has to hold these and no others.

    Raises:
        IntegrityError: it does not, or is damaged.
    """
    return _tensors(artifact, name, artifact.read(name, largest_file(shapes)), shapes, dtypes)


def _tensors(artifact: Artifact, name: str, data: bytes, shapes: Shapes, dtypes: Collection[str]) -> dict[str, Tensor]:
    try:
        return load_weights(data, shapes=shapes, dtypes=dtypes)[0]
    except ValueError as error:
        raise _refused(artifact, name, str(error)) from error


def _refused(artifact: Artifact, name: str, why: str) -> IntegrityError:
    path = artifact.manifest.path
    return IntegrityError(f"{where(artifact.store, f'{path}/{name}')}: {why}: delete the folder {path} and run again.")
