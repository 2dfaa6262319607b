"""Algorithm 1 on one of a study's concepts, as the farm's rank search does it, but on any base of the study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes import Base

from e2gan.batches import ConceptPairs
from e2gan.infer import adapted_generator, base_generator, edit_images
from e2gan.lora import grow, new_adapter, thresholds
from e2gan.lora_attach import attach, extract
from e2gan.metrics import evaluate
from e2gan.ranks import RankRound, Ranks, rank_search
from farm.stages.ranks import SearchState

if TYPE_CHECKING:
    from pathlib import Path

    from study import Study


def search_ranks(study: Study, base: Base, concept: str, key: str) -> list[RankRound]:
    """The rounds of the search; those done before an interruption are read from `<folder>/ranks/<key>/`."""
    config, folder = study.config, study.folder / "ranks" / key
    weights, _ = study.base(base)
    text, validation = study.text(concept), study.pairs(concept, "validation")
    pairs = ConceptPairs(concept=concept, text=text, pairs=study.pairs(concept, "train"))
    state = _last_round(folder, scale=config.adapters.lora.scale)

    def score(ranks: Ranks) -> float:
        nonlocal state
        number = len(state.rounds)
        seed = study.plan.seed("ranks", f"{concept}/{number}")
        generator = base_generator(base.model, {name: tensor.clone() for name, tensor in weights.items()})
        if state.adapter is None:
            adapter = new_adapter(generator, ranks, scale=config.adapters.lora.scale, seed=seed)
        else:
            adapter = grow(state.adapter, generator, ranks, seed=seed)
        attach(generator, adapter)
        what = f"rank search on {concept}, round {number + 1}"
        study.fit(generator, [pairs], config.ranks.train, what, key=f"{key}-{number}", seed=seed)
        adapter = extract(generator)
        edited = edit_images(adapted_generator(base.model, weights, adapter), text, validation.source)
        scores = evaluate(edited, validation.target, validation.source, [study.extractor])
        value = scores["frechet"][study.plan.score_name]
        state = SearchState(rounds=[*state.rounds, RankRound(ranks=dict(ranks), score=value)], adapter=adapter)
        _keep(state, folder / str(number))
        return value

    limits = thresholds(base_generator(base.model, weights))
    tolerance, patience = config.ranks.tolerance, config.ranks.patience
    return rank_search(score, limits, tolerance=tolerance, patience=patience, start=state.rounds)


def _keep(state: SearchState, folder: Path) -> None:
    """A round is there once its folder has its name."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, data in state.to_files().items():
        (partial / name).write_bytes(data)
    partial.rename(folder)


def _last_round(folder: Path, *, scale: float) -> SearchState:
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    if not numbers:
        return SearchState()
    files = {path.name: path.read_bytes() for path in (folder / str(numbers[-1])).iterdir()}
    return SearchState.from_files(files, scale=scale)
