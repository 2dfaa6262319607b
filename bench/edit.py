"""Images a second of a farm that edits, against the bare diffusers pipeline called in a loop, as JSON lines.

    python bench/edit.py [--images 40] [--concepts 4] [--side 256] [--steps 10] [--model FOLDER_OR_ID] [--gpus 0]

Both use the same InstructPix2Pix model and the same settings on as many CPU threads; without --model it is a small one
with random weights. The bare loop is what one would write: one image a call, nothing measured, nothing kept. The farm
does all it does in a run: Ray, batches, every edit measured, Parquet parts, manifests. Its rate is that of further
concepts, once the worker has loaded its model. What it does besides runs beside the teacher, on a core of its own: a
machine with a GPU has one; on a CPU leave one free with --threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

PROMPT = "make it a charcoal drawing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40, help="edits of a concept")
    parser.add_argument("--concepts", type=int, default=4)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default=None, help="default float32 on the CPU, float16 on a GPU")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(small_model(Path(folder) / "model"))
        dtype = options.dtype or ("float16" if options.gpus else "float32")
        teacher = {"kind": "instruct-pix2pix", "model": model, "dtype": dtype, "side": options.side}
        teacher |= {"steps": options.steps, "safety_checker": options.model is not None}
        bare = bare_loop(teacher, options.images, "cuda" if options.gpus else "cpu")
        print(json.dumps({"what": "bare pipeline in a loop", "images_per_second": round(bare, 3)}), flush=True)
        farm = farm_rate(teacher, options, Path(folder))
        row = {"what": "farm", "images_per_second": round(farm, 3), "of_bare": round(farm / bare, 3)}
        print(json.dumps(row), flush=True)


def small_model(folder: Path) -> Path:
    """An InstructPix2Pix with random weights, a hundredth of the real one's UNet."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "farm"))
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
    from tiny_diffusers import TEXT_WIDTH, stable_diffusion

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        cross_attention_dim=TEXT_WIDTH,
    )
    return stable_diffusion(folder, pipeline=StableDiffusionInstructPix2PixPipeline, unet=unet)


def bare_loop(teacher: dict[str, Any], images: int, device: str) -> float:
    """Images a second of the pipeline by itself."""
    import numpy as np
    import PIL.Image
    import torch
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    options: dict[str, Any] = {} if teacher["safety_checker"] else {"safety_checker": None}
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        teacher["model"], torch_dtype=getattr(torch, teacher["dtype"]), **options
    ).to(device)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    random = np.random.default_rng(0)
    side = teacher["side"]
    photos = [PIL.Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(images)]

    def edit(photo: PIL.Image.Image, seed: int) -> None:
        pipeline(
            PROMPT,
            photo,
            num_inference_steps=teacher["steps"],
            guidance_scale=7.5,
            image_guidance_scale=1.5,
            generator=torch.Generator("cpu").manual_seed(seed),
        )

    for photo in photos[:2]:
        edit(photo, 0)
    started = time.monotonic()
    for seed, photo in enumerate(photos):
        edit(photo, seed)
    return images / (time.monotonic() - started)


def farm_rate(teacher: dict[str, Any], options: argparse.Namespace, folder: Path) -> float:
    """Images a second of further concepts in a farm: a run of all concepts, less a run of one."""
    from farm import cluster
    from farm.config import FarmConfig
    from farm.plan import make_plan
    from farm.stages.ingest import ingest
    from farm.stages.select import select
    from farm.stop import Stop
    from farm.store import open_store

    seconds = []
    for count in (1, 1 + options.concepts):
        ids = [f"concept-{n}" for n in range(count)]
        config = FarmConfig.model_validate(
            {
                "name": "bench",
                "store": str(folder / f"farm-{count}"),
                "sources": {
                    "size": options.side,
                    "crops_per_photo": max(2, options.images // 5),
                    "crop_scale": [0.6, 1.0],
                    "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
                },
                "teachers": {"pix2pix": teacher},
                "catalogue": [{"id": concept_id, "prompt": PROMPT} for concept_id in ids],
                "quality": {"retries": 0, "min_good": 0},
                "base": {"concepts": ids[:1]},
                "ranks": {"concepts": ids[-1:]},
                "cluster": {"cpus": options.threads, "edit": {"cpus": options.threads, "gpus": options.gpus}},
            }
        )
        store, plan = open_store(config.store), make_plan(config)
        ingest(store, plan, lambda done, total: None)
        select(store, plan)
        with cluster.connected(config.cluster):
            started = time.monotonic()
            failures = cluster.edit_concepts(store, plan, ids, Edits(), Stop())
            seconds.append(time.monotonic() - started)
        assert not failures, failures
    made = sum(manifest_images(store, plan, concept_id) for concept_id in ids[1:])
    return made / (seconds[1] - seconds[0])


def manifest_images(store: Any, plan: Any, concept_id: str) -> int:
    from farm.artifacts import open_artifact

    return int(open_artifact(store, plan.edits(concept_id).path).manifest.summary["images"])


class Edits:
    """A progress bar nobody looks at."""

    def update(self, done: int, total: int, note: str = "") -> None:
        pass


if __name__ == "__main__":
    main()
