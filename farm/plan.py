"""What a farm will make: the Spec, and so the address, of every artifact, known before anything runs.

A Spec's digest covers the stage's version, configuration and inputs, so a changed prompt gives that concept's edits and
adapter new addresses and leaves everything else where it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from e2gan.config import TrainConfig
from farm.artifacts import Spec
from farm.config import FarmConfig
from farm.editors import editor_fingerprint
from farm.errors import UserError
from farm.sources import fingerprint

VERSIONS = {"sources": 1, "selection": 1, "edits": 1, "base": 2, "ranks": 2, "adapter": 2}
"""A stage's version, raised when its code comes to make other bytes of the same inputs."""


@dataclass(frozen=True)
class Plan:
    """The Specs of a farm. Pickled to workers: photos and teachers are fingerprinted once, by `make_plan`.

    photos: fingerprint of the photographs. editors: fingerprint of each concept's teacher.
    """

    config: FarmConfig
    photos: Mapping[str, Any]
    editors: Mapping[str, Mapping[str, Any]]

    @property
    def sources(self) -> Spec:
        return self._spec("sources", f"sources/{self.config.sources.kind}", {"sources": self.photos}, {})

    @property
    def selection(self) -> Spec:
        config = {"selection": self.config.selection.model_dump(mode="json")}
        return self._spec("selection", "selections", config, {"sources": self.sources.digest})

    def edits(self, concept_id: str) -> Spec:
        config = {"prompt": self.config.concept(concept_id).prompt, "editor": dict(self.editors[concept_id])}
        return self._spec("edits", f"edits/{concept_id}", config, {"selection": self.selection.digest})

    @property
    def base(self) -> Spec:
        base = self.config.base
        config = {
            "concepts": list(base.concepts),  # their order is that of the training data
            "model": asdict(self.config.model),
            "train": _train(base.train),
            "text": self._text,
        }
        return self._spec("base", "bases", config, self._edits(*base.concepts))

    @property
    def ranks(self) -> Spec:
        ranks = self.config.ranks
        config = {
            "train": _train(ranks.train),
            "tolerance": ranks.tolerance,
            "patience": ranks.patience,
            "lora": asdict(self.config.adapters.lora),
            "score": self.score_name,
            "text": self._text,
        }
        return self._spec("ranks", "ranks", config, {"base": self.base.digest, **self._edits(*ranks.concepts)})

    def adapter(self, concept_id: str) -> Spec:
        adapters = self.config.adapters
        config = {
            "train": _train(adapters.train),
            "lora": asdict(adapters.lora),
            "score": self.score_name,
            "text": self._text,
        }
        inputs = {"base": self.base.digest, "ranks": self.ranks.digest, **self._edits(concept_id)}
        return self._spec("adapter", f"adapters/{concept_id}", config, inputs)

    def adapter_key(self, concept_id: str) -> str:
        """The key of the concept's adapter in the queue: another one when what it is made from changes."""
        return f"{concept_id}-{self.adapter(concept_id).digest}"

    @property
    def score_name(self) -> str:
        """The Fréchet distance this farm measures: `clean_fid` with Inception weights, `fd_untrained` without."""
        return "clean_fid" if self.config.evaluation.inception else "fd_untrained"

    def seed(self, stage: str, concept_id: str = "") -> int:
        """The seed of a stage, derived from the run's."""
        text = f"{self.config.seed}\n{stage}\n{concept_id}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    @property
    def _text(self) -> dict[str, Any]:
        return self.config.text.model_dump(mode="json")

    def _edits(self, *concept_ids: str) -> dict[str, str]:
        return {f"edits/{concept_id}": self.edits(concept_id).digest for concept_id in concept_ids}

    def _spec(self, stage: str, folder: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Spec:
        return Spec(
            stage=stage,
            version=VERSIONS[stage],
            folder=folder,
            config=config,
            inputs=inputs,
            seed=self.config.seed,
        )


def make_plan(config: FarmConfig) -> Plan:
    """Fingerprint the photographs and every teacher.

    Raises:
        UserError: photographs or a teacher's model are missing; the sentence names the concept.
    """
    editors = {}
    for concept in config.catalogue:
        try:
            editors[concept.id] = editor_fingerprint(concept.editor, concept.id)
        except UserError as error:
            raise UserError(f"catalogue: {concept.id}: {error}") from error
    return Plan(config=config, photos=fingerprint(config.sources), editors=editors)


def _train(config: TrainConfig) -> dict[str, Any]:
    """What decides a training's outcome: how often it is checkpointed does not."""
    return {name: value for name, value in asdict(config).items() if name != "checkpoint_every"}
