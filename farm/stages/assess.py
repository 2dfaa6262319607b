"""An adapter measured as it is published: in fp16, merged into the base, on the test split."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypedDict

from torch import Tensor

from e2gan.distances import frechet_distance, frechet_interval
from e2gan.features import FeatureExtractor
from e2gan.infer import adapted_generator, base_generator, edit_images
from e2gan.lora_peft import load
from e2gan.metrics import Scores, contrast, each_image, evaluate, mean_interval, variety
from e2gan.model import Generator
from farm.plan import Plan
from farm.stages.judge import extractor
from farm.stages.pictures import Pictures
from farm.stages.quality import edited_pairs
from farm.stages.ranks import read_ranks
from farm.standing import base_concepts
from farm.store import Store
from farm.weights import read_base

TIMED_EDITS = 5


class AdapterScores(Scores):
    """`metrics.json`: what an adapter makes of the test photos; images in -1..1.

    interval: 95 % bootstrap intervals over test images, of `l1`, `psnr`, `ssim` and `gain`. l1_base: L1 to the teacher
    of the base without the adapter, and gain, by how much the adapter's is smaller. frechet_base, frechet_untouched:
    the distances that `frechet` has, of the base's pictures and of the photos. variety, contrast: of the adapter's
    pictures (`e2gan.metrics`); variety_teacher, contrast_teacher: of the teacher's edits.
    """

    interval: dict[str, tuple[float, float]]
    l1_base: float
    gain: float
    frechet_base: dict[str, float]
    frechet_untouched: dict[str, float]
    variety: float
    variety_teacher: float
    contrast: float
    contrast_teacher: float


class Checks(TypedDict):
    """What else the gate asks.

    finite: whether every weight is. base: the digest of the base that the adapter's file names. other_ranks: the layers
    whose rank is not the search's, each with both. in_base: whether the base has learned the concept itself.
    latency_ms: the median time of one edit, uncompiled, on the CPU of the worker that trained it.
    """

    finite: bool
    base: str
    other_ranks: dict[str, tuple[int, int]]
    in_base: bool
    latency_ms: float


@dataclass(frozen=True)
class Assessment:
    """ids: of the test images. pictures: the photos, the teacher's edits and the adapter's. parameters: its count.
    frechet_interval: 95 %, by the distance's name; for people, and no part of `metrics.json`."""

    scores: AdapterScores
    frechet_interval: dict[str, tuple[float, float]]
    checks: Checks
    parameters: int
    ids: tuple[str, ...]
    pictures: Pictures


def assess(store: Store, plan: Plan, concept_id: str, files: Mapping[str, bytes], text: Tensor) -> Assessment:
    """Measure the adapter in `files`, in peft's format, whatever base or ranks it is of.

    Args:
        text: the prompt's embedding `[77, 768]`.

    Raises:
        ValueError: a file is damaged, or the adapter is of a network of another shape.
    """
    named = json.loads(files["adapter_config.json"])["base_model_name_or_path"]
    wanted = read_ranks(store, plan)
    model, weights = read_base(store, plan.base.path)
    adapter = load(files, base=named, model=model)
    student, base = adapted_generator(model, weights, adapter), base_generator(model, weights)
    pairs = edited_pairs(store, plan, concept_id, "test")
    edited, unadapted = (edit_images(generator, text, pairs.source) for generator in (student, base))
    features, seed = extractor(plan.config.evaluation.inception), plan.seed("adapter", concept_id)
    layers = sorted({*adapter.ranks, *wanted})
    ranks = {layer: (adapter.ranks.get(layer, 0), wanted.get(layer, 0)) for layer in layers}
    checks = Checks(
        finite=all(bool(tensor.isfinite().all()) for tensor in adapter.tensors.values()),
        base=named,
        other_ranks={layer: both for layer, both in ranks.items() if both[0] != both[1]},
        in_base=concept_id in base_concepts(store, plan),
        latency_ms=round(latency_ms(student, text, pairs.source[:1]), 2),
    )
    pictures = (pairs.source, pairs.target, edited)
    scores = measure(pictures, unadapted, features, seed=seed)
    estimate = frechet_interval(features(edited), features(pairs.target), paired=True, seed=seed)
    interval = {features.name: (estimate.low, estimate.high)}
    return Assessment(scores, interval, checks, adapter.parameter_count(), pairs.ids, pictures)


def measure(pictures: Pictures, unadapted: Tensor, features: FeatureExtractor, *, seed: int) -> AdapterScores:
    """Score pictures as an adapter's. unadapted: what the base makes of the photos. seed: of the resampling."""
    photos, target, edited = pictures
    own, l1_base = each_image(edited, target), each_image(unadapted, target)["l1"]
    own["gain"] = l1_base - own["l1"]
    of_target = features(target)

    def distance(images: Tensor) -> dict[str, float]:
        return {features.name: frechet_distance(features(images), of_target)}

    return AdapterScores(
        **evaluate(edited, target, photos, [features]),
        interval={name: mean_interval(values, seed=seed) for name, values in own.items()},
        l1_base=float(l1_base.mean()),
        gain=float(own["gain"].mean()),
        frechet_base=distance(unadapted),
        frechet_untouched=distance(photos),
        variety=variety(edited),
        variety_teacher=variety(target),
        contrast=contrast(edited),
        contrast_teacher=contrast(target),
    )


def latency_ms(generator: Generator, text: Tensor, photo: Tensor) -> float:
    """The median time of an edit of uint8 `[1, 3, h, w]`, in milliseconds; the first one is not counted."""
    edit_images(generator, text, photo)
    seconds = []
    for _ in range(TIMED_EDITS):
        started = time.perf_counter()
        edit_images(generator, text, photo)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds)
