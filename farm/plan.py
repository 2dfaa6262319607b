"""What a farm will make: the Spec, and so the address, of every artifact, known before anything runs.

A Spec's digest covers the stage's version, configuration and inputs, so a changed prompt gives that concept's edits and
adapter new addresses and leaves everything else where it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from e2gan.config import TrainConfig
from farm.artifacts import Spec
from farm.config import FarmConfig
from farm.editors import EditorSettings, editor_fingerprint
from farm.editors.weights import file_sha256, weights_fingerprint
from farm.errors import UserError
from farm.sources import fingerprint

VERSIONS = {
    "sources": 1,
    "selection": 1,
    "comparison": 1,
    "edits": 2,
    "quality": 1,
    "representatives": 1,
    "base": 2,
    "ranks": 2,
    "adapter": 3,
}
"""A stage's version, raised when its code comes to make other bytes of the same inputs."""


@dataclass(frozen=True)
class Plan:
    """The Specs of a farm. Pickled to workers: photos and teachers are fingerprinted once, by `make_plan`.

    photos: fingerprint of the photographs. teachers: fingerprint of every teacher a concept may have, by concept and
    name (see `FarmConfig.candidates`). models: fingerprints of the other models that edits depend on, by key.
    """

    config: FarmConfig
    photos: Mapping[str, Any]
    teachers: Mapping[str, Mapping[str, Mapping[str, Any]]]
    models: Mapping[str, Any]

    @cached_property
    def sources(self) -> Spec:
        return self._spec("sources", f"sources/{self.config.sources.kind}", {"sources": self.photos}, {})

    @cached_property
    def selection(self) -> Spec:
        selection = self.config.selection.model_dump(mode="json")
        if model := self.models.get("selection.path"):
            selection["path"] = model
        config = {"selection": selection}
        return self._spec("selection", "selections", config, {"sources": self.sources.digest})

    def compared(self, concept_id: str) -> bool:
        """Whether the concept's teacher is chosen by comparing several."""
        return len(self.teachers[concept_id]) > 1

    def comparison(self, concept_id: str) -> Spec:
        """What several teachers make of a few photos, and which one the concept gets."""
        config = {
            **self._asked(concept_id),
            "teachers": {name: dict(teacher) for name, teacher in self.teachers[concept_id].items()},
            "probes": self.config.comparison.probes,
            "quality": self._quality,
        }
        return self._spec("comparison", f"comparisons/{concept_id}", config, {"selection": self.selection.digest})

    def edits(self, concept_id: str) -> Spec:
        """What the teacher makes of every selected photo, good or bad: untouched by the limits of `quality`."""
        config = {**self._asked(concept_id), "clip": self.models.get("quality.clip")}
        inputs = {"selection": self.selection.digest}
        if self.compared(concept_id):
            inputs["comparison"] = self.comparison(concept_id).digest
        else:
            config["editor"] = dict(*self.teachers[concept_id].values())
        return self._spec("edits", f"edits/{concept_id}", config, inputs)

    def quality(self, concept_id: str) -> Spec:
        """Which edits are learned from, and the further attempts at those that are not."""
        config = {"quality": self._quality}
        return self._spec("quality", f"quality/{concept_id}", config, {"edits": self.edits(concept_id).digest})

    @cached_property
    def representatives(self) -> Spec:
        """The base's concepts where they are chosen by their edits."""
        config = {"count": self.config.base.representatives, "clip": self.models.get("quality.clip")}
        return self._spec("representatives", "representatives", config, self._checked(*self.config.eligible))

    @cached_property
    def base(self) -> Spec:
        base = self.config.base
        if base.representatives is None:
            inputs = self._checked(*base.concepts)
        else:
            inputs = {"representatives": self.representatives.digest}
        config = {
            "concepts": list(base.concepts),  # their order is that of the training data
            "model": asdict(self.config.model),
            "train": _train(base.train),
            "text": self._text,
        }
        return self._spec("base", "bases", config, inputs)

    @cached_property
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
        return self._spec("ranks", "ranks", config, {"base": self.base.digest, **self._checked(*ranks.concepts)})

    def adapter(self, concept_id: str) -> Spec:
        adapters = self.config.adapters
        config = {
            "train": _train(adapters.train),
            "lora": asdict(adapters.lora),
            "score": self.score_name,
            "text": self._text,
        }
        inputs = {"base": self.base.digest, "ranks": self.ranks.digest, **self._checked(concept_id)}
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

    @property
    def _quality(self) -> dict[str, Any]:
        return {**self.config.quality.model_dump(mode="json"), "clip": self.models.get("quality.clip")}

    def _asked(self, concept_id: str) -> dict[str, Any]:
        request = self.config.concept(concept_id).request
        return {"prompt": request.instruction, "captions": [request.before, request.after]}

    def _checked(self, *concept_ids: str) -> dict[str, str]:
        return {f"quality/{concept_id}": self.quality(concept_id).digest for concept_id in concept_ids}

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
    """Fingerprint the photographs, every teacher and every other model the edits depend on.

    Raises:
        UserError: photographs or a model are missing; the sentence names the concept or the key.
    """
    known: dict[Any, dict[str, Any]] = {}

    def taken(concept_id: str, editor: EditorSettings) -> dict[str, Any]:
        key = (editor, concept_id if editor.kind == "procedural" else None)
        if key not in known:
            known[key] = editor_fingerprint(editor, concept_id)
        return known[key]

    teachers: dict[str, dict[str, dict[str, Any]]] = {}
    for concept in config.catalogue:
        teachers[concept.id] = {}
        for name, editor in config.candidates(concept.id).items():
            try:
                teachers[concept.id][name] = taken(concept.id, editor)
            except UserError as error:
                raise config.of_teacher(error, concept.id, name) from error
    models = {}
    for key, path in (("selection.path", config.selection.path), ("quality.clip", config.quality.clip)):
        if path is not None:
            file = Path(path).expanduser()
            models[key] = {"sha256": file_sha256(file)} if file.is_file() else weights_fingerprint(path, key=key)
    return Plan(config=config, photos=fingerprint(config.sources), teachers=teachers, models=models)


def _train(config: TrainConfig) -> dict[str, Any]:
    """What decides a training's outcome: how often it is checkpointed does not."""
    return {name: value for name, value in asdict(config).items() if name != "checkpoint_every"}
