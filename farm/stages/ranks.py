"""The doubling rank search (E2GAN Algorithm 1) of one sampled concept, a Ray Tune trial, and the merged result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from e2gan.batches import ConceptPairs
from e2gan.infer import adapted_generator, base_generator
from e2gan.lora import Adapter, grow, new_adapter, thresholds
from e2gan.lora_attach import attach, extract
from e2gan.ranks import RankRound, Ranks, best, merge, rank_search
from e2gan.train import Progress, train
from farm.artifacts import Manifest, commit, open_artifact
from farm.plan import Plan
from farm.stages.judge import judge, text_embedding
from farm.stages.quality import edited_pairs
from farm.store import Store
from farm.weights import read_base


@dataclass(frozen=True, kw_only=True)
class SearchState:
    """Where a concept's search stands: its rounds, and the adapter the last one trained."""

    rounds: Sequence[RankRound] = field(default_factory=tuple)
    adapter: Adapter | None = None

    def to_files(self) -> dict[str, bytes]:
        """The state exactly (tensors in float32)."""
        import safetensors.torch

        assert self.adapter is not None
        return {
            "rounds.json": json.dumps([asdict(done) for done in self.rounds]).encode(),
            "adapter.safetensors": safetensors.torch.save(
                dict(self.adapter.tensors), {"scale": str(self.adapter.scale)}
            ),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, scale: float) -> SearchState:
        """What `to_files` wrote; `scale` is the farm's `adapters.lora.scale`."""
        import safetensors.torch

        rounds = [RankRound(**done) for done in json.loads(files["rounds.json"])]
        tensors = safetensors.torch.load(files["adapter.safetensors"])
        return cls(rounds=rounds, adapter=Adapter(ranks=dict(rounds[-1].ranks), scale=scale, tensors=tensors))


def search(
    store: Store,
    plan: Plan,
    concept_id: str,
    *,
    start: SearchState | None = None,
    device: str | torch.device = "cpu",
    on_round: Callable[[SearchState], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[RankRound]:
    """Algorithm 1 for one concept: train, score on the validation split, double every rank, until saturated.

    The update learned at one rank is kept when the rank grows. The paper measures on the concept's test set; here that
    set is kept for judging the finished adapter.
    """
    config = plan.config
    model, weights = read_base(store, plan.base.path)
    text = text_embedding(config, config.concept(concept_id).prompt)
    pairs = ConceptPairs(concept=concept_id, text=text, pairs=edited_pairs(store, plan, concept_id, "train"))
    state = start or SearchState()

    def evaluate(ranks: Ranks) -> float:
        nonlocal state
        seed = plan.seed("ranks", f"{concept_id}/{len(state.rounds)}")
        generator = base_generator(model, {name: tensor.clone() for name, tensor in weights.items()})
        if state.adapter is None:
            adapter = new_adapter(generator, ranks, scale=config.adapters.lora.scale, seed=seed)
        else:
            adapter = grow(state.adapter, generator, ranks, seed=seed)
        attach(generator, adapter)
        train(generator, [pairs], config.ranks.train, seed=seed, device=device, on_progress=on_progress)
        adapter = extract(generator)
        scores, _ = judge(store, plan, concept_id, adapted_generator(model, weights, adapter), text, split="validation")
        score = scores["frechet"][plan.score_name]
        state = SearchState(rounds=[*state.rounds, RankRound(ranks=dict(ranks), score=score)], adapter=adapter)
        if on_round:
            on_round(state)
        return score

    return rank_search(
        evaluate,
        thresholds(base_generator(model, weights)),
        tolerance=config.ranks.tolerance,
        patience=config.ranks.patience,
        start=state.rounds,
    )


def search_trial(settings: Mapping[str, Any]) -> None:
    """One Ray Tune trial: the search of `settings["concept"]`, restored at the doubling it had reached.

    settings: `concept`, and what `ray.tune.with_parameters` adds: `store`, `plan`, `on_progress`.
    """
    import tempfile
    from pathlib import Path

    from ray import tune

    store, plan, concept_id = settings["store"], settings["plan"], settings["concept"]
    torch.set_num_threads(plan.config.cluster.ranks.cpus)
    start = None
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        start = SearchState.from_files(files, scale=plan.config.adapters.lora.scale)

    def report(state: SearchState) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in state.to_files().items():
                (Path(folder) / name).write_bytes(data)
            rounds = [asdict(done) for done in state.rounds]
            checkpoint = tune.Checkpoint.from_directory(folder)
            tune.report({"score": rounds[-1]["score"], "rounds": rounds}, checkpoint=checkpoint)

    rounds = search(
        store,
        plan,
        concept_id,
        start=start,
        device="cuda" if torch.cuda.is_available() else "cpu",
        on_round=report,
        on_progress=settings["on_progress"],
    )
    if start is not None and len(start.rounds) == len(rounds):
        # Killed between its last report and its return: the search is over, but Tune has seen no result since.
        report(start)


def commit_ranks(
    store: Store, plan: Plan, searched: Mapping[str, Sequence[RankRound]], *, wall_seconds: float
) -> Manifest:
    """Commit `ranks/<digest>/ranks.json`: the layer-wise largest ranks, and every concept's rounds."""
    ranks = merge(best(rounds) for rounds in searched.values())
    concepts = {name: [asdict(done) for done in rounds] for name, rounds in sorted(searched.items())}
    document = {"ranks": ranks, "score": plan.score_name, "concepts": concepts}
    files = {"ranks.json": json.dumps(document, indent=1).encode()}
    return commit(store, plan.ranks, files, wall_seconds=wall_seconds, summary={"ranks": ranks})


def read_ranks(store: Store, plan: Plan) -> Ranks:
    """The ranks new adapters are trained at."""
    ranks: Ranks = json.loads(open_artifact(store, plan.ranks.path).read("ranks.json"))["ranks"]
    return ranks
