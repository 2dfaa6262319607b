"""The base: one generator that learns a few concepts together (E2GAN section 4.2.1), on Ray Train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from e2gan.batches import ConceptPairs
from e2gan.config import GeneratorConfig
from e2gan.metrics import Scores
from e2gan.model import build_generator
from e2gan.train import Progress, train
from farm.artifacts import Manifest, commit, open_artifact
from farm.plan import Plan
from farm.stages.judge import judge, text_embedding
from farm.stages.pictures import picture_sheet, spread
from farm.stages.quality import edited_pairs
from farm.standing import base_concepts
from farm.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping


PREVIEW_CONCEPTS = 8
"""Base concepts shown in the base's preview; the report shows every concept's adapter."""


@dataclass
class History:
    """What a checkpoint does not hold: the losses so far, a row a report, the seconds they took, and the steps after
    which a training that had died went on."""

    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed: list[float] = field(default_factory=list)


def train_base_worker(settings: Mapping[str, Any]) -> None:
    """What every Ray Train worker runs; the first one commits `bases/<digest>`.

    settings: `store`, `plan`, `on_progress` (called with a `Progress`).
    """
    import tempfile
    from pathlib import Path

    import ray.train
    import ray.train.torch

    store, plan, on_progress = settings["store"], settings["plan"], settings["on_progress"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plan.config.cluster.base.cpus)

    history = History()

    def report(step: int, checkpoint: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                (Path(folder) / "checkpoint.safetensors").write_bytes(checkpoint)
                (Path(folder) / "history.json").write_text(json.dumps(asdict(history)))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=saved)

    resumed = None
    if latest := ray.train.get_checkpoint():
        with latest.as_directory() as folder:
            resumed = (Path(folder) / "checkpoint.safetensors").read_bytes()
            history = History(**json.loads((Path(folder) / "history.json").read_text()))
        history.resumed.append(history.losses[-1]["step"])
    pretrain(
        store,
        plan,
        device=ray.train.torch.get_device(),
        checkpoint=resumed,
        history=history,
        on_checkpoint=report,
        on_progress=on_progress if rank == 0 else None,
        worker=(rank, world),
    )


def pretrain(
    store: Store,
    plan: Plan,
    *,
    device: str | torch.device = "cpu",
    checkpoint: bytes | None = None,
    history: History | None = None,
    on_checkpoint: Callable[[int, bytes], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    worker: tuple[int, int] = (0, 1),
) -> Manifest | None:
    """Train the base on the training pairs of its concepts, judge it, and commit it (the first worker does).

    Files: `generator.safetensors` (float32), `config.json`, `metrics.json` (scores by concept), `preview.webp`.

    history: what happened up to `checkpoint`; it grows as the training goes on.
    """
    import safetensors.torch

    history = history or History()
    started = time.monotonic() - history.seconds
    config = plan.config
    concepts = [
        ConceptPairs(
            concept=concept_id,
            text=text_embedding(config, config.concept(concept_id).prompt),
            pairs=edited_pairs(store, plan, concept_id, "train"),
        )
        for concept_id in base_concepts(store, plan)
    ]
    generator = build_generator(config.model, seed=plan.seed("base"))

    def progress(done: Progress) -> None:
        history.losses.append({"step": done.step, **done.losses})
        history.seconds = time.monotonic() - started
        if on_progress:
            on_progress(done)

    train(
        generator,
        concepts,
        config.base.train,
        seed=plan.seed("base"),
        device=device,
        checkpoint=checkpoint,
        on_checkpoint=on_checkpoint,
        on_progress=progress,
        data_parallel=torch.nn.parallel.DistributedDataParallel if worker[1] > 1 else None,
        worker=worker,
    )
    if worker[0] != 0:
        return None

    metrics: dict[str, Scores] = {}
    rows: list[Tensor] = []
    for concept in concepts:
        scores, pictures = judge(store, plan, concept.concept, generator, concept.text)
        metrics[concept.concept] = scores
        if len(rows) < 3 * PREVIEW_CONCEPTS:
            rows += spread(pictures, 6)
    seconds = time.monotonic() - started
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    files: dict[str, bytes | None] = {
        "generator.safetensors": safetensors.torch.save(weights),
        "config.json": json.dumps(asdict(config.model), indent=1).encode(),
        "metrics.json": json.dumps(metrics, indent=1).encode(),
        "preview.webp": picture_sheet(rows),
    }
    summary = {"losses": history.losses, "metrics": metrics, "resumed": history.resumed}
    return commit(store, plan.base, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)


def read_base(store: Store, path: str) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """Configuration and weights of the base at `bases/<digest>`."""
    import safetensors.torch

    artifact = open_artifact(store, path)
    config = GeneratorConfig(**json.loads(artifact.read("config.json")))
    return config, safetensors.torch.load(artifact.read("generator.safetensors"))
