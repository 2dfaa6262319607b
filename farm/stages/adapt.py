"""One concept's adapter: trained on its edits, judged on the test split, committed, published if good enough."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

import safetensors.torch
import torch

from e2gan.batches import ConceptPairs
from e2gan.checkpoint import CheckpointError
from e2gan.infer import base_generator
from e2gan.lora import new_adapter
from e2gan.lora_attach import attach, extract
from e2gan.lora_peft import save
from e2gan.train import Progress, train
from farm.artifacts import Manifest, commit, open_artifact
from farm.card import Subject, model_card
from farm.gate import judgement
from farm.objects import TooLargeError
from farm.plan import Plan
from farm.registry import Entry, Registry
from farm.signing import NOBODY, Keys
from farm.stages.assess import assess
from farm.stages.compare import teacher_of
from farm.stages.history import History
from farm.stages.judge import text_embedding
from farm.stages.pictures import picture_sheet, spread
from farm.stages.quality import edited_pairs
from farm.stages.ranks import read_ranks
from farm.store import NotFoundError, Store
from farm.weights import read_base

CHECKPOINT_BYTES = 4 << 30
"""A checkpoint has some twenty numbers a weight of the networks; a larger object is none."""

_log = logging.getLogger(__name__)


def adapt(
    store: Store,
    plan: Plan,
    concept_id: str,
    *,
    device: str | torch.device = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Manifest:
    """Commit `adapters/<concept>/<digest>`, measured as it is published (`farm.stages.assess`).

    Files: `adapter_model.safetensors` and `adapter_config.json` in peft's format, `text.safetensors`, `metrics.json`,
    `preview.webp` (rows: photos, teacher, adapter), `README.md`, the model card.

    Until then `scratch/adapter-<digest>/checkpoint.safetensors` holds the last checkpoint, from which whoever trains
    this adapter next goes on; one that is damaged or does not fit is passed over.

    Raises:
        Stopped: `should_stop` said so (see `e2gan.train`); the checkpoint is in the store.
    """
    config = plan.config
    spec = plan.adapter(concept_id)
    key = f"scratch/adapter-{spec.digest}/checkpoint.safetensors"
    history, kept = _kept(store, key)
    concept = config.concept(concept_id)
    model, weights = read_base(store, plan.base.path)
    text = text_embedding(config, concept.prompt)
    seed = plan.seed("adapter", concept_id)

    generator = base_generator(model, {name: tensor.clone() for name, tensor in weights.items()})
    attach(
        generator,
        new_adapter(generator, read_ranks(store, plan), scale=config.adapters.lora.scale, seed=seed),
    )
    pairs = edited_pairs(store, plan, concept_id, "train")

    def progress(done: Progress) -> None:
        history.add(done)
        if on_progress:
            on_progress(done)

    def learn(checkpoint: bytes | None) -> None:
        train(
            generator,
            [ConceptPairs(concept=concept_id, text=text, pairs=pairs)],
            config.adapters.train,
            seed=seed,
            device=device,
            checkpoint=checkpoint,
            on_checkpoint=lambda _, made: store.put(key, history.within(made)),
            on_progress=progress,
            should_stop=should_stop,
        )

    try:
        learn(kept)
    except CheckpointError as error:
        _log.warning("%s is passed over: %s", key, error)
        history = History()
        learn(None)

    files = save(extract(generator), base=plan.base.digest)
    assessed = assess(store, plan, concept_id, files, text)
    teacher = teacher_of(store, plan, concept_id)
    assert teacher is not None  # a concept without one has no edits to learn from
    subject = Subject(
        teacher=teacher,
        train_images=len(pairs),
        train_photos=_photographs(store, plan, pairs.ids),
        test_photos=_photographs(store, plan, assessed.ids),
        in_base=assessed.checks["in_base"],
        parameters=assessed.parameters,
        scores=assessed.scores,
    )
    files["text.safetensors"] = safetensors.torch.save({"text": text})
    files["metrics.json"] = (json.dumps(assessed.scores, indent=1) + "\n").encode()
    files["preview.webp"] = picture_sheet(spread(assessed.pictures, 6))
    files["README.md"] = model_card(plan, concept_id, subject).encode()
    seconds = history.elapsed()
    learned = {"losses": history.losses, "resumed": history.resumed, "pairs": len(pairs)}
    measured = {"metrics": assessed.scores, "frechet_interval": assessed.frechet_interval, "checks": assessed.checks}
    summary = {**measured, **learned}
    manifest = commit(store, spec, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)
    store.delete(key)
    return manifest


def _kept(store: Store, key: str) -> tuple[History, bytes | None]:
    """The checkpoint that another training of this adapter left, and what it went through."""
    try:
        checkpoint = store.get(key, CHECKPOINT_BYTES)
        return History.resumed_from(checkpoint), checkpoint
    except NotFoundError:
        pass
    except (CheckpointError, TooLargeError) as error:
        _log.warning("%s is passed over: %s", key, error)
    return History(), None


def _photographs(store: Store, plan: Plan, image_ids: Sequence[str]) -> int:
    """How many photographs these images are crops of."""
    photos = json.loads(open_artifact(store, plan.sources.path).read("photos.json"))["photos"]
    return sum(not set(image_ids).isdisjoint(photo["images"]) for photo in photos)


def publish(store: Store, plan: Plan, concept_id: str, keys: Keys = NOBODY) -> Entry | None:
    """Point the registry at the concept's adapter; None where the gate does not let it pass (`farm.gate`)."""
    spec = plan.adapter(concept_id)
    adapter = open_artifact(store, spec.path).manifest
    if judgement(plan, adapter):
        return None
    return Registry(store, keys).publish(
        concept_id,
        adapter=spec.path,
        digest=spec.digest,
        base=plan.base.digest,
        metrics=adapter.summary["metrics"],
        manifest=adapter,
    )
