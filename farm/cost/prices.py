"""The `cost` section of a farm's configuration: what nodes cost and which ones there are."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.catalogue import Slug

StageName = Literal["edit", "base", "ranks", "adapters"]
STAGES: tuple[StageName, ...] = ("edit", "base", "ranks", "adapters")
"""The stages that have workers, as the section `cluster` names them."""


class NodePrice(BaseModel):
    """A type of node. per_hour: what one costs, in `cost.currency`. count: how many of them a run may use.

    cpus, gpus, memory_gb, labels: what one has, as the section `cluster` asks for it; memory is not looked at when left
    out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_hour: float = Field(ge=0)
    cpus: int = Field(ge=1)
    gpus: float = Field(default=0, ge=0)
    memory_gb: float | None = Field(default=None, gt=0)
    labels: dict[str, str] = Field(default_factory=dict)
    count: int = Field(default=1, ge=1)


class CostConfig(BaseModel):
    """What nodes cost, for `farm cost` and the report; nothing is said of money without any.

    stages: the type of node that a stage's workers run on; where it is left out, the one on which its worker is
    cheapest, of those that have room for it. Nodes that no stage runs on, such as the head, are paid for all the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str = Field(default="USD", pattern="^[A-Z]{3}$")
    nodes: dict[Slug, NodePrice] = Field(default_factory=dict)
    stages: dict[StageName, Slug] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> CostConfig:
        for stage, name in self.stages.items():
            if name not in self.nodes:
                raise ValueError(
                    f"stages.{stage}: nodes has no {name!r}, only {', '.join(self.nodes) or 'nothing at all'}"
                )
        return self
