"""The base: one generator that learns a few concepts together (E2GAN section 4.2.1), on Ray Train."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from e2gan.batches import ConceptPairs
from e2gan.metrics import Scores
from e2gan.model import build_generator
from e2gan.train import Progress, Stopped, train
from farm.artifacts import Manifest, commit
from farm.boards import Board
from farm.plan import Plan
from farm.stages.history import History
from farm.stages.judge import judge, text_embedding
from farm.stages.pictures import picture_sheet, spread
from farm.stages.quality import edited_pairs
from farm.standing import base_concepts
from farm.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping


PREVIEW_CONCEPTS = 8
"""Base concepts shown in the base's preview; the report shows every concept's adapter."""
LIVE_PICTURES = 8
"""Photos shown while the base is trained, with what it makes of them."""


def train_base_worker(settings: Mapping[str, Any]) -> None:
    """What every Ray Train worker runs; the first one commits `bases/<digest>`.

    Asked to stop, all of them report a checkpoint of the same step and return, and nothing is committed.

    settings: `store`, `plan`, `on_progress` (called with a `Progress`) and, if it can be stopped, `should_stop`; the
        `board` of `pretrain`, if there is one.
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
                (Path(folder) / "checkpoint.safetensors").write_bytes(history.within(checkpoint))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=saved)

    resumed = None
    if latest := ray.train.get_checkpoint():
        with latest.as_directory() as folder:
            resumed = (Path(folder) / "checkpoint.safetensors").read_bytes()
        history = History.resumed_from(resumed)
    with suppress(Stopped):  # its checkpoint has been reported
        pretrain(
            store,
            plan,
            device=ray.train.torch.get_device(),
            checkpoint=resumed,
            history=history,
            on_checkpoint=report,
            on_progress=on_progress if rank == 0 else None,
            should_stop=settings.get("should_stop"),
            worker=(rank, world),
            board=settings.get("board"),
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
    should_stop: Callable[[], bool] | None = None,
    worker: tuple[int, int] = (0, 1),
    board: str | None = None,
) -> Manifest | None:
    """Train the base on the training pairs of its concepts, judge it, and commit it (the first worker does).

    Files: `generator.safetensors` (float32), `config.json`, `metrics.json` (scores by concept), `preview.webp`.

    Until then, `live_base(plan)` in the store shows how far it is: `samples.webp` (rows: photos, teacher, base) and
    `losses.jsonl`, both anew with every checkpoint.

    history: what happened up to `checkpoint`; it grows as the training goes on.
    should_stop: see `e2gan.train`; of several workers the first one is asked.
    board: a folder of the store that gets TensorBoard event files, anew with every checkpoint.
    """
    import safetensors.torch

    history = history or History()
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
        history.add(done)
        if on_progress:
            on_progress(done)

    live = live_base(plan)
    curves = Board(store, board) if board and worker[0] == 0 else None

    def show(step: int, samples: Tensor) -> None:
        store.put(f"{live}/samples.webp", picture_sheet(list(samples[:, :LIVE_PICTURES])))
        store.put(f"{live}/losses.jsonl", "".join(f"{json.dumps(row)}\n" for row in history.losses).encode())
        if curves:
            curves.put(step, history.losses, samples)

    if should_stop and worker[1] > 1:
        should_stop = _agreed(should_stop, worker[0], device)
    train(
        generator,
        concepts,
        config.base.train,
        seed=plan.seed("base"),
        device=device,
        checkpoint=checkpoint,
        on_checkpoint=on_checkpoint,
        on_progress=progress,
        on_samples=show if worker[0] == 0 else None,
        samples_every=config.base.train.checkpoint_every,
        should_stop=should_stop,
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
    seconds = history.elapsed()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    files = {
        "generator.safetensors": safetensors.torch.save(weights),
        "config.json": json.dumps(asdict(config.model), indent=1).encode(),
        "metrics.json": json.dumps(metrics, indent=1).encode(),
        "preview.webp": picture_sheet(rows),
    }
    summary = {"losses": history.losses, "metrics": metrics, "resumed": history.resumed}
    for name in ("samples.webp", "losses.jsonl"):
        store.delete(f"{live}/{name}")
    return commit(store, plan.base, files, wall_seconds=seconds, device_seconds=seconds, summary=summary)


def live_base(plan: Plan) -> str:
    """The folder of the store that shows the base while it is trained."""
    return f"live/base-{plan.base.digest}"


def _agreed(should_stop: Callable[[], bool], rank: int, device: str | torch.device) -> Callable[[], bool]:
    """The first worker's answer, given to all of them: they stop at the same step or not at all."""

    def agreed() -> bool:
        answer = torch.tensor(rank == 0 and should_stop(), dtype=torch.uint8, device=device)
        torch.distributed.broadcast(answer, src=0)
        return bool(answer)

    return agreed
