import dataclasses
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from e2gan.config import AdapterConfig, GeneratorConfig, Part, TrainConfig, pix2pix_nine_blocks

CONFIGS = [GeneratorConfig, TrainConfig, AdapterConfig]


def test_defaults_are_the_papers() -> None:
    generator, train = GeneratorConfig(), TrainConfig()
    assert (generator.channels, generator.residual_blocks, generator.transformer_blocks) == (64, 3, 1)
    assert (generator.transformer_position, generator.transformer_sampling, generator.cross_attention) == (
        2,
        "conv",
        True,
    )
    assert (generator.heads, generator.text_tokens, generator.text_width) == (8, 77, 768)
    assert (train.epochs, train.batch_size, train.learning_rate, train.betas) == (100, 32, 2e-4, (0.5, 0.999))
    assert train.l1_weight == 100
    assert (train.optimizer, train.weight_decay, train.ema_decay, train.max_gradient_norm) == ("adam", 0, 0, None)
    assert (train.frozen, train.crop, train.flip) == ((), None, False)
    baseline = pix2pix_nine_blocks()
    assert (baseline.channels, baseline.residual_blocks, baseline.transformer_blocks) == (64, 9, 0)


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
        (GeneratorConfig, {"residual_blocks": -1, "transformer_blocks": 0}),
        (GeneratorConfig, {"transformer_blocks": 3}),
        (GeneratorConfig, {"transformer_blocks": -1}),
        (GeneratorConfig, {"transformer_position": 4}),
        (GeneratorConfig, {"transformer_position": -1}),
        (GeneratorConfig, {"transformer_position": 2, "residual_blocks": 1}),
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
        (TrainConfig, {"adversarial_start": float("nan")}),
        (TrainConfig, {"gradient_weight": float("nan")}),
        (TrainConfig, {"weight_decay": -0.1, "optimizer": "adamw"}),
        (TrainConfig, {"weight_decay": 0.1}),
        (TrainConfig, {"ema_decay": 1.0}),
        (TrainConfig, {"ema_decay": -0.1}),
        (TrainConfig, {"ema_decay": float("nan")}),
        (TrainConfig, {"max_gradient_norm": 0.0}),
        (TrainConfig, {"max_gradient_norm": float("nan")}),
        (TrainConfig, {"crop": 8}),
        (TrainConfig, {"crop": 20}),
        (TrainConfig, {"crop": 0}),
        (TrainConfig, {"frozen": ("sampling", "transformer", "residual")}),
        (AdapterConfig, {"scale": 0.0}),
    ],
)
def test_nonsense_is_refused_by_name(config: type, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        config(**values)


def test_heads_and_position_are_free_without_transformer() -> None:
    assert GeneratorConfig(channels=3, transformer_blocks=0, residual_blocks=1).channels == 3


@pytest.mark.parametrize(("crop", "frozen"), [(16, ("residual",)), (256, ("sampling", "sampling", "transformer"))])
def test_the_edges_of_what_is_allowed(crop: int, frozen: tuple[Part, ...]) -> None:
    TrainConfig(crop=crop, frozen=frozen, ema_decay=0.9999, adversarial_start=1.0, optimizer="adamw", weight_decay=0.1)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TrainConfig, {"optimizer": "sgd"}),
        (TrainConfig, {"schedule": "step"}),
        (TrainConfig, {"adversarial_loss": "wgan"}),
        (TrainConfig, {"frozen": ["head"]}),
        (GeneratorConfig, {"transformer_sampling": "nearest"}),
        (GeneratorConfig, {"transformer": True}),
    ],
)
def test_a_farms_file_with_a_choice_that_is_none_is_refused(config: type, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        TypeAdapter(config).validate_python(values)


def test_a_farms_file_names_frozen_parts_in_a_list() -> None:
    assert TypeAdapter(TrainConfig).validate_python({"frozen": ["residual"]}).frozen == ("residual",)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_farms_file_reads_them_and_refuses_unknown_keys(config: type) -> None:
    reader = TypeAdapter(config)
    assert reader.validate_python(dataclasses.asdict(config())) == config()
    with pytest.raises(ValidationError, match="learning_rat\n"):
        reader.validate_python({"learning_rat": 1.0})
