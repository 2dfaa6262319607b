"""Core ML packages: many concepts on one base (iOS 18 and later), or a single concept (iOS 16 and later)."""

from __future__ import annotations

import tempfile
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from e2gan.export.libraries import coremltools, quietly
from e2gan.export.mlpackage import INPUT, OUTPUT, Template, read_model, write_model
from e2gan.export.phone import Concept, PhoneGenerator, concept_tensors, random_concept
from e2gan.infer import adapted_generator, check_sides
from e2gan.lora import Adapter
from e2gan.model import Generator
from e2gan.ranks import Ranks

Precision = Literal["fp16", "int8", "8bit", "6bit", "4bit"]
"""Of the base's weights: as they are, eight bits linear by output channel, or 256, 64 or 16 values a tensor by k-means,
which suits weights of which a few are large. What a concept adds is always fp16, and so is the computation."""


def template(base: Generator, ranks: Ranks, *, side: int, precision: Precision = "fp16") -> Template:
    """Convert a generator with LoRA branches of these ranks, once for all concepts that have them.

    side: of the square images, px.

    Raises:
        ValueError: a side that the network cannot take, ranks of layers it does not have, or coremltools is missing.
    """
    concept = random_concept(base, ranks, seed=0)
    tools = coremltools()
    with quietly(), tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "template.mlpackage"
        model = _converted(PhoneGenerator(base, concept), side, tools.target.iOS18)
        _compressed(model, precision, {array.tobytes() for array in halved(concept).values()}).save(str(package))
        del model
        return Template(package, halved(concept))


def halved(concept: Concept) -> dict[str, NDArray[np.float16]]:
    """A concept as a package holds it."""
    return {name: tensor.half().contiguous().numpy() for name, tensor in concept.items()}


def single(
    base: Generator, adapter: Adapter | None, text: torch.Tensor, package: Path, *, side: int, precision: Precision
) -> None:
    """Write a package of one concept, its adapter merged into the base's weights, for iOS 16 and later.

    Raises:
        ValueError: as `template` and `concept_tensors` do.
    """
    concept = concept_tensors(base, adapter, text)
    folded = {name: tensor for name, tensor in concept.items() if not name.endswith((".a", ".b"))}
    merged = adapted_generator(base.config, base.state_dict(), adapter) if adapter else base
    tools = coremltools()
    with quietly():
        model = _converted(PhoneGenerator(merged, folded), side, tools.target.iOS16)
        _compressed(model, precision, set()).save(str(package))
        del model
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    plain = read_model(package)
    plain.description.ClearField("metadata")  # the date of the conversion
    write_model(package, plain)


def _converted(network: PhoneGenerator, side: int, target: Any) -> Any:
    tools = coremltools()
    image = torch.zeros(1, 3, side, side)
    check_sides(image)
    with quietly():
        program = torch.export.export(network, (image,)).run_decompositions({})
        return tools.convert(
            program,
            inputs=[tools.ImageType(name=INPUT, shape=image.shape, color_layout=tools.colorlayout.RGB)],
            outputs=[tools.ImageType(name=OUTPUT, color_layout=tools.colorlayout.RGB)],
            minimum_deployment_target=target,
            compute_precision=tools.precision.FLOAT16,
            skip_model_load=True,
        )


def _compressed(model: Any, precision: Precision, concept: Set[bytes]) -> Any:
    """The model with its base's large weights in fewer bits; those whose content is the concept's stay."""
    if precision == "fp16":
        return model
    compress = coremltools().optimize.coreml
    if precision == "int8":
        chosen: Any = compress.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=2048)
    else:
        chosen = compress.OpPalettizerConfig(mode="kmeans", nbits=int(precision[0]), weight_threshold=2048)
    held = compress.get_weights_metadata(model, weight_threshold=0)
    own = {name: None for name, weight in held.items() if weight.val.astype(np.float16).tobytes() in concept}
    config = compress.OptimizationConfig(global_config=chosen, op_name_configs=own)
    with quietly():
        reduce = compress.linear_quantize_weights if precision == "int8" else compress.palettize_weights
        return reduce(model, config)
