import dataclasses
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from e2gan.config import AdapterConfig, GeneratorConfig, TrainConfig, pix2pix_nine_blocks

CONFIGS = [GeneratorConfig, TrainConfig, AdapterConfig]


def test_defaults_are_the_papers() -> None:
    generator, train = GeneratorConfig(), TrainConfig()
    assert (generator.channels, generator.residual_blocks, generator.transformer) == (64, 3, True)
    assert (generator.heads, generator.text_tokens, generator.text_width) == (8, 77, 768)
    assert (train.epochs, train.batch_size, train.learning_rate, train.betas) == (100, 32, 2e-4, (0.5, 0.999))
    assert train.l1_weight == 100
    baseline = pix2pix_nine_blocks()
    assert (baseline.channels, baseline.residual_blocks, baseline.transformer) == (64, 9, False)


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen_and_keyword_only(config: type) -> None:
    made = config()
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 1)
    with pytest.raises(TypeError):
        config(1)
    assert hash(made) == hash(config())


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (GeneratorConfig, {"channels": 0}),
        (GeneratorConfig, {"channels": 3, "heads": 8}),
        (GeneratorConfig, {"heads": 0}),
        (GeneratorConfig, {"residual_blocks": 1}),
        (GeneratorConfig, {"residual_blocks": -1, "transformer": False}),
        (GeneratorConfig, {"text_tokens": 0}),
        (GeneratorConfig, {"text_width": 0}),
        (TrainConfig, {"epochs": 0}),
        (TrainConfig, {"epochs": float("nan")}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"learning_rate": -1e-4}),
        (TrainConfig, {"discriminator_learning_rate": 0.0}),
        (TrainConfig, {"l1_weight": -1.0}),
        (TrainConfig, {"adversarial_weight": -0.5}),
        (TrainConfig, {"discriminator_channels": 0}),
        (TrainConfig, {"checkpoint_every": 0}),
        (TrainConfig, {"adversarial_start": 1.5}),
        (TrainConfig, {"adversarial_start": -0.1}),
        (AdapterConfig, {"scale": 0.0}),
    ],
)
def test_nonsense_is_refused_by_name(config: type, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        config(**values)


def test_heads_are_free_without_transformer() -> None:
    assert GeneratorConfig(channels=3, transformer=False).channels == 3


@pytest.mark.parametrize("config", CONFIGS)
def test_a_farms_file_reads_them_and_refuses_unknown_keys(config: type) -> None:
    reader = TypeAdapter(config)
    assert reader.validate_python(dataclasses.asdict(config())) == config()
    with pytest.raises(ValidationError, match="learning_rat\n"):
        reader.validate_python({"learning_rat": 1.0})
