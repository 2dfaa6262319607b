"""One concept's adapter: trained on its edits, judged on the test split, committed, published if good enough."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import safetensors.torch
import torch

from e2gan.batches import ConceptPairs
from e2gan.checkpoint import CheckpointError
from e2gan.infer import adapted_generator, base_generator
from e2gan.lora import new_adapter
from e2gan.lora_attach import attach, extract
from e2gan.lora_peft import load, save
from e2gan.metrics import Scores
from e2gan.train import Progress, train
from farm.artifacts import Manifest, commit, open_artifact
from farm.plan import Plan
from farm.registry import Entry, Registry
from farm.stages.compare import teacher_of
from farm.stages.history import History
from farm.stages.judge import judge, text_embedding
from farm.stages.pictures import picture_sheet, spread
from farm.stages.pretrain import read_base
from farm.stages.quality import edited_pairs
from farm.stages.ranks import read_ranks
from farm.store import NotFoundError, Store

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
    """Commit `adapters/<concept>/<digest>`, judged as it is published: in fp16, merged into the base.

    Files: `adapter_model.safetensors` and `adapter_config.json` in peft's format, `text.safetensors`, `metrics.json`,
    `preview.webp` (rows: photos, teacher, adapter), `README.md`.

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
    student = adapted_generator(model, weights, load(files, base=plan.base.digest))
    scores, pictures = judge(store, plan, concept_id, student, text)
    files["text.safetensors"] = safetensors.torch.save({"text": text})
    files["metrics.json"] = (json.dumps(scores, indent=1) + "\n").encode()
    files["preview.webp"] = picture_sheet(spread(pictures, 6))
    files["README.md"] = _card(plan, concept_id, teacher_of(store, plan, concept_id), scores).encode()
    seconds = history.elapsed()
    summary = {"metrics": scores, "losses": history.losses, "resumed": history.resumed, "pairs": len(pairs)}
    manifest = commit(store, spec, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)
    store.delete(key)
    return manifest


def _kept(store: Store, key: str) -> tuple[History, bytes | None]:
    """The checkpoint that another training of this adapter left, and what it went through."""
    try:
        checkpoint = store.get(key)
        return History.resumed_from(checkpoint), checkpoint
    except NotFoundError:
        pass
    except CheckpointError as error:
        _log.warning("%s is passed over: %s", key, error)
    return History(), None


def publish(store: Store, plan: Plan, concept_id: str) -> Entry | None:
    """Point the registry at the concept's adapter; None where it is not good enough (`adapters.max_l1_ratio`)."""
    spec = plan.adapter(concept_id)
    scores: Scores = json.loads(open_artifact(store, spec.path).read("metrics.json"))
    if not plan.config.adapters.accept(scores):
        return None
    return Registry(store).publish(
        concept_id, adapter=spec.path, digest=spec.digest, base=plan.base.digest, metrics=dict(scores)
    )


def _card(plan: Plan, concept_id: str, teacher: str | None, scores: Scores) -> str:
    """The adapter's model card."""
    concept = plan.config.concept(concept_id)
    distances = ", ".join(f"{name} {value:.3f}" for name, value in scores["frechet"].items())
    return f"""---
library_name: peft
base_model: {plan.base.digest}
tags: [e2gan, lora, image-to-image]
---
# {concept.id}

{concept.prompt}, learned from the `{teacher}` teacher. A LoRA adapter in peft's format for the E2GAN base
`{plan.base.digest}`; read it with `e2gan.lora_peft.load`, which knows LoRA on transposed convolutions.

On {scores["n"]} test images (values in -1..1): L1 to the teacher {scores["l1"]:.3f} (untouched photo
{scores["l1_untouched"]:.3f}), PSNR {scores["psnr"]:.2f} dB, SSIM {scores["ssim"]:.3f}, {distances}.
`preview.webp` shows photos, the teacher's edits and the adapter's.
"""
