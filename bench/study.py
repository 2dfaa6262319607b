"""Comparisons of ways to make one concept's model: what `experiment.py` and `ablate.py` are made of.

A farm's configuration names the photographs, the teachers and the training; a `Recipe` (`recipes.py`) says how a model
is made from their edits. A `Study` makes the edits, trains the bases it needs once, runs recipes, and keeps every
result, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from machine import machine
from recipes import Base, Recipe, Search, ranks_of, shuffled_ranks
from search import search_ranks
from torch import Tensor

from e2gan.batches import ConceptPairs
from e2gan.checkpoint import CheckpointFolder
from e2gan.config import TrainConfig
from e2gan.embeddings import thumbnail_embedding
from e2gan.features import CachedFeatures
from e2gan.infer import edit_images
from e2gan.lora import new_adapter
from e2gan.lora_attach import attach, extract
from e2gan.lora_peft import save
from e2gan.metrics import append_record, evaluate
from e2gan.model import Generator, build_generator
from e2gan.pairs import Pairs
from e2gan.ranks import Ranks, best
from e2gan.selection import random_sample, similarity_clusters
from e2gan.tracking import TensorBoard
from e2gan.train import Progress, train
from e2gan.weights import load_weights, save_weights
from farm.artifacts import find
from farm.config import FarmConfig
from farm.plan import Plan, make_plan
from farm.stages.ingest import ingest
from farm.stages.judge import extractor, text_embedding
from farm.stages.pictures import picture_sheet, spread
from farm.stages.quality import edited_pairs
from farm.stages.select import select
from farm.stages.teach import teach
from farm.stages.units import Worker
from farm.store import open_store


class Study:
    """Runs recipes on one farm's edits and writes `<folder>/results.jsonl` and `<folder>/pictures/`."""

    def __init__(self, config: FarmConfig, folder: Path, *, device: str = "cpu") -> None:
        self.config, self.folder, self.device = config, folder, device
        self.plan: Plan = make_plan(config)
        self.store = open_store(config.store)
        self.extractor = CachedFeatures(extractor(config.evaluation.inception), folder / "features")
        self._pairs: dict[tuple[str, str], Pairs] = {}

    # Data

    def make_edits(self, concepts: Iterable[str]) -> None:
        """Have the teachers edit every photograph for the concepts; what is in the store is left."""
        if find(self.store, self.plan.sources.path) is None:
            ingest(self.store, self.plan, lambda done, total: None)
        if find(self.store, self.plan.selection.path) is None:
            select(self.store, self.plan)
        worker = Worker(self.store, self.plan)
        for concept in concepts:
            if find(self.store, self.plan.quality(concept).path) is None:
                say(f"editing for {concept}")
                teach(self.store, self.plan, concept, worker)

    def pairs(self, concept: str, split: str) -> Pairs:
        if (concept, split) not in self._pairs:
            self._pairs[concept, split] = edited_pairs(self.store, self.plan, concept, split)
        return self._pairs[concept, split]

    def chosen(self, recipe: Recipe, target: str) -> Pairs:
        """The recipe's training pairs of the concept."""
        pairs = self.pairs(target, "train")
        if recipe.pairs is None:
            return pairs
        seed = self.plan.seed("selection")
        if recipe.selection == "cluster":
            ids = similarity_clusters(thumbnail_embedding(pairs.source), pairs.ids, recipe.pairs, seed)
        else:
            ids = random_sample(pairs.ids, recipe.pairs, seed)
        rows = [pairs.ids.index(i) for i in ids]
        return Pairs(ids=tuple(ids), source=pairs.source[rows], target=pairs.target[rows])

    def text(self, concept: str) -> Tensor:
        return text_embedding(self.config, self.config.concept(concept).prompt)

    # Training

    def base(self, base: Base) -> tuple[dict[str, Tensor], float]:
        """A base's weights and the seconds its training took; trained once and kept, resumed after an interruption."""
        settings = self._base_settings(base)
        key = self._base_key(base)
        file = self.folder / "bases" / f"{key}.safetensors"
        if not file.exists():
            concepts = []
            for concept in base.concepts:
                pairs = self.pairs(concept, "train")
                if base.autoencoder:
                    pairs = replace(pairs, target=pairs.source)
                concepts.append(ConceptPairs(concept=concept, text=self.text(concept), pairs=pairs))
            generator = build_generator(base.model, seed=self.plan.seed("base"))
            seconds = self.fit(generator, concepts, settings, f"base {key}", key=key, seed=self.plan.seed("base"))
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(save_weights(_weights(generator), seconds=f"{seconds:.1f}"))
            partial.replace(file)
        weights, metadata = load_weights(file.read_bytes())
        return weights, float(metadata["seconds"])

    def search(self, base: Base, concept: str) -> Ranks:
        """The best ranks that Algorithm 1 finds for a concept on a base; searched once and kept."""
        search = self.config.ranks.model_dump(mode="json", exclude={"concepts"})
        key = _digest(self._base_key(base), search, self.plan.edits(concept).digest, self._farm_key())
        return best(search_ranks(self, base, concept, key))

    def model(self, recipe: Recipe, target: str) -> tuple[Generator, dict[str, Any]]:
        """The recipe's trained generator of the concept, and what it took."""
        shape = recipe.model if recipe.cross_attention else replace(recipe.model, cross_attention=False)
        generator = build_generator(shape, seed=self.plan.seed("adapter", target))
        if recipe.base is not None:
            weights, _ = self.base(recipe.base)
            if not recipe.cross_attention:
                weights = {n: w for n, w in weights.items() if ".cross_attention." not in n and ".norm2." not in n}
            generator.load_state_dict(weights)
        pairs = self.chosen(recipe, target)
        took: dict[str, Any] = {"pairs": len(pairs), "images": recipe.images}
        if not recipe.images:
            return generator.eval(), {**took, "seconds": 0.0, "trainable_parameters": 0, "bytes": 0}

        settings = replace(self.config.adapters.train, epochs=recipe.images / len(pairs), frozen=recipe.frozen)
        if recipe.adversarial_weight is not None:
            settings = replace(settings, adversarial_weight=recipe.adversarial_weight)
        if recipe.ranks is None:
            settings = replace(settings, learning_rate=self.config.base.train.learning_rate)
        else:
            ranks = self._ranks(recipe, generator)
            if isinstance(recipe.ranks, Search):
                took["ranks"] = ranks
            attach(generator, new_adapter(generator, ranks, scale=self.config.adapters.lora.scale, seed=0))
        concepts = [ConceptPairs(concept=target, text=self.text(target), pairs=pairs)]
        key, seed = self._recipe_key(recipe, target), self.plan.seed("adapter", target)
        seconds = self.fit(generator, concepts, settings, f"{recipe.name} on {target}", key=key, seed=seed)
        if recipe.ranks is not None:
            size = len(save(extract(generator), base="")["adapter_model.safetensors"])
        else:
            size = 2 * sum(p.numel() for p in generator.parameters())
        trained = sum(p.numel() for p in generator.parameters() if p.requires_grad)
        took |= {"seconds": round(seconds, 1), "trainable_parameters": trained, "bytes": size}
        return generator.eval(), took

    def fit(
        self,
        generator: Generator,
        concepts: Sequence[ConceptPairs],
        settings: TrainConfig,
        what: str,
        *,
        key: str,
        seed: int,
    ) -> float:
        """Train in place, resumed after an interruption; returns the seconds it took.

        key: of the checkpoints, and of the event files under `<folder>/tensorboard`.
        """
        checkpoints = CheckpointFolder(self.folder / "checkpoints" / key)
        seconds_file = checkpoints.path / "seconds"
        before = float(seconds_file.read_text()) if seconds_file.exists() else 0.0
        started = time.monotonic()

        def progress(done: Progress) -> None:
            board.progress(done)
            if done.step % 200 == 0 or done.step == done.steps:
                losses = " ".join(f"{name} {value:.4f}" for name, value in done.losses.items())
                say(f"{what}: step {done.step} of {done.steps}, {losses}, {time.monotonic() - started:.0f} s")

        def checkpoint(step: int, data: bytes) -> None:
            checkpoints.save(step, data)
            seconds_file.write_text(f"{before + time.monotonic() - started}")

        with TensorBoard(self.folder / "tensorboard" / key) as board:
            train(
                generator,
                concepts,
                settings,
                seed=seed,
                device=self.device,
                checkpoint=checkpoints.latest(),
                on_checkpoint=checkpoint,
                on_progress=progress,
                on_samples=board.samples,
            )
        shutil.rmtree(checkpoints.path, ignore_errors=True)  # a short training has left none
        return before + time.monotonic() - started

    def _ranks(self, recipe: Recipe, generator: Generator) -> Ranks:
        seed = self.plan.seed("ranks")
        if not isinstance(recipe.ranks, Search):
            assert recipe.ranks is not None
            return ranks_of(recipe.ranks, generator, seed)
        assert recipe.base is not None, "Algorithm 1 searches on a base"
        ranks = self.search(recipe.base, recipe.ranks.concept)
        return shuffled_ranks(ranks, generator, seed) if recipe.ranks.shuffled else ranks

    def _base_settings(self, base: Base) -> TrainConfig:
        settings = self.config.base.train
        if base.images is not None:
            pairs = sum(len(self.pairs(concept, "train")) for concept in base.concepts)
            settings = replace(settings, epochs=base.images / pairs)
        if base.autoencoder:  # "with only the L1 loss" (appendix D.2)
            settings = replace(settings, adversarial_weight=0.0, gradient_weight=0.0)
        return settings

    # Keys: of everything a result depends on but its name

    def _base_key(self, base: Base) -> str:
        edits = [self.plan.edits(concept).digest for concept in base.concepts]
        settings = asdict(self._base_settings(base))
        return _digest(asdict(replace(base, images=None)), settings, edits, self._farm_key())

    def _recipe_key(self, recipe: Recipe, target: str) -> str:
        keys: list[Any] = [self._base_key(recipe.base) if recipe.base else None]
        if isinstance(recipe.ranks, Search):
            keys += [self.config.ranks.model_dump(mode="json"), self.plan.edits(recipe.ranks.concept).digest]
        settings = [asdict(self.config.adapters.train), self.config.base.train.learning_rate]
        keys += [self.plan.edits(target).digest, self._farm_key()]
        return _digest(asdict(replace(recipe, name="", base=None)), settings, keys)

    def _farm_key(self) -> list[Any]:
        config = self.config
        return [config.seed, config.text.model_dump(), config.adapters.lora.scale, self.plan.score_name]

    # Results

    def run(self, recipe: Recipe, target: str, *, bootstrap: int = 200) -> dict[str, Any]:
        """The recipe's scores on the target's test split; from `results.jsonl` where they are there already."""
        key = self._recipe_key(recipe, target)
        results = self.folder / "results.jsonl"
        for line in results.read_text().splitlines() if results.exists() else ():
            if (record := json.loads(line))["key"] == key:
                return {**record, "recipe": recipe.name}  # tables share recipes and name them each in its way
        generator, took = self.model(recipe, target)
        test = self.pairs(target, "test")
        edited = edit_images(generator, self.text(target), test.source)
        scores = evaluate(edited, test.target, test.source, [self.extractor], bootstrap=bootstrap)
        pictures = self.folder / "pictures" / target / f"{recipe.name}.webp"
        pictures.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_bytes(picture_sheet(spread((test.source, test.target, edited), 6)))
        record = {"key": key, "target": target, "recipe": recipe.name, **took, **scores}
        append_record(results, record)
        return record

    def describe(self) -> dict[str, Any]:
        """The machine and the settings every result of this study shares."""
        return {**machine(), "model": asdict(self.config.model), "side": self.config.sources.size}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _weights(generator: Generator) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in generator.state_dict().items()}


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
