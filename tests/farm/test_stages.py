"""What each stage makes, checked against the files themselves, on a tiny farm without Ray."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from stage_farm import CONCEPTS, copied, one_thread, plan_of, prepare

from e2gan.config import GeneratorConfig, TrainConfig
from e2gan.lora import crucial_layers
from e2gan.model import Generator
from e2gan.pairs import Image
from e2gan.ranks import RankRound
from e2gan.selection import random_sample, similarity_clusters
from e2gan.train import Stopped, uses_bf16
from e2gan.weights import save_weights
from farm.artifacts import open_artifact, verify
from farm.errors import UserError
from farm.plan import Plan
from farm.registry import Registry
from farm.stages import ranks
from farm.stages.adapt import adapt, publish
from farm.stages.history import History
from farm.stages.ingest import ingest, split_ids
from farm.stages.pretrain import live_base, pretrain
from farm.stages.ranks import SearchState, commit_ranks, read_ranks, search
from farm.stages.select import select, selected_ids
from farm.store import LocalStore, Store
from farm.weights import read_base


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def store(root: Path) -> Store:
    return LocalStore(root)


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return plan_of(root)


def document(store: Store, path: str, name: str) -> Any:
    return json.loads(open_artifact(store, path).read(name))


def table(store: Store, path: str) -> dict[str, Image]:
    """Every image of an artifact's tables of images, read with pyarrow and Pillow alone."""
    images = {}
    for name in sorted(open_artifact(store, path).manifest.files):
        if name.endswith(".parquet") and not name.startswith("measures/"):
            rows = pq.read_table(io.BytesIO(store.get(f"{path}/{name}")))
            assert rows.column_names == ["id", "image"]
            for image_id, data in zip(*rows.to_pydict().values(), strict=True):
                images[image_id] = np.asarray(PIL.Image.open(io.BytesIO(data)))
    return images


def hashes(store: Store, path: str) -> Mapping[str, Any]:
    return open_artifact(store, path).manifest.files


def no_progress(done: int, total: int) -> None:
    pass


def test_every_artifact_is_sound(store: Store, plan: Plan) -> None:
    specs = [plan.sources, plan.selection, plan.base, plan.ranks]
    specs += [spec(c) for c in CONCEPTS for spec in (plan.edits, plan.quality, plan.adapter)]
    for spec in specs:
        assert verify(store, spec.path) == []
        assert open_artifact(store, spec.path).manifest.digest == spec.digest


def test_photographs_are_split_whole(store: Store, plan: Plan) -> None:
    photos = document(store, plan.sources.path, "photos.json")["photos"]
    assert {photo["id"] for photo in photos} >= {"astronaut", "chelsea", "china", "coffee", "flower", "rocket"}
    assert [photo["split"] for photo in photos].count("train") == 4
    images = table(store, plan.sources.path)
    assert [image_id for photo in photos for image_id in photo["images"]] == list(images)
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in images.values())
    for photo in photos:
        assert photo.keys() == {"id", "name", "sha256", "split", "images"}
        assert photo["images"] == [f"{photo['id']}-{number:03d}" for number in range(6)]
        assert len(photo["sha256"]) == 64
    splits = split_ids(store, plan)
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 24, "validation": 6, "test": 12}
    of_photo = {split: {image_id.rpartition("-")[0] for image_id in ids} for split, ids in splits.items()}
    assert sum(len(ids) for ids in of_photo.values()) == len(set().union(*of_photo.values())) == 7


def test_ingest_tells_how_far_it_is(root: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    manifest = ingest(LocalStore(tmp_path), plan_of(tmp_path), lambda done, total: told.append((done, total)))
    assert told == [(number, 7) for number in range(1, 8)]
    assert manifest.summary == {"photos": 7, "skipped": [], "images": 42}
    assert manifest.files == hashes(LocalStore(root), plan_of(root).sources.path)


def test_many_images_are_stored_in_parts(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.stages.ingest.PART_ROWS", 10)
    store = LocalStore(tmp_path)
    manifest = ingest(store, plan, no_progress)
    parts = [name for name in manifest.files if name.endswith(".parquet")]
    assert parts == [f"part-{number:05d}.parquet" for number in range(4)]
    sizes = [pq.read_table(io.BytesIO(store.get(f"{plan.sources.path}/{name}"))).num_rows for name in parts]
    assert sizes == [12, 12, 12, 6]


def test_training_images_are_chosen_from_the_training_photographs(store: Store, plan: Plan) -> None:
    chosen, all_ids = document(store, plan.selection.path, "selection.json"), split_ids(store, plan)
    assert len(chosen["train"]) == len(set(chosen["train"])) == 9
    assert set(chosen["train"]) < set(all_ids["train"])
    assert chosen["validation"] == all_ids["validation"] and chosen["test"] == all_ids["test"]


def test_without_clusters_every_training_image_is_chosen(root: Path, tmp_path: Path) -> None:
    store, plan = copied(root, tmp_path / "farm", "sources"), plan_of(root, selection__clusters=None)
    select(store, plan)
    assert selected_ids(store, plan) == split_ids(store, plan)


def test_training_images_chosen_at_random(root: Path, tmp_path: Path) -> None:
    store, plan = copied(root, tmp_path / "farm", "sources"), plan_of(root, selection__method="random")
    manifest = select(store, plan)
    chosen, all_ids = selected_ids(store, plan), split_ids(store, plan)
    assert chosen["train"] == random_sample(all_ids["train"][::-1], 9, plan.seed("selection"))
    assert chosen["train"] != selected_ids(LocalStore(root), plan_of(root))["train"]
    assert chosen["validation"] == all_ids["validation"] and chosen["test"] == all_ids["test"]
    assert manifest.summary["train"] == 9 and manifest.summary["training_images"] == 24


def test_training_images_chosen_by_an_onnx_embedding(root: Path, tmp_path: Path) -> None:
    """With a network that gives the mean colour, which lengths of 1 leave as a direction."""
    onnx = pytest.importorskip("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["image"], ["colour"], axes=[2, 3], keepdims=0)],
        "embed",
        [helper.make_tensor_value_info("image", number, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("colour", number, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (tmp_path / "colour.onnx").write_bytes(model.SerializeToString())
    selection = {"clusters": 5, "embedding": "onnx", "path": str(tmp_path / "colour.onnx")}
    store, plan = copied(root, tmp_path / "farm", "sources"), plan_of(root, selection=selection)
    select(store, plan)
    photos, ids = table(store, plan.sources.path), split_ids(store, plan)["train"]
    colours = np.stack([photos[i].mean(axis=(0, 1)) - 127.5 for i in ids])
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)
    wanted = similarity_clusters(colours, ids, 5, plan.seed("selection"))
    assert selected_ids(store, plan)["train"] == wanted


def test_the_base_resumes_from_any_checkpoint(root: Path, tmp_path: Path) -> None:
    """The second half of its steps has a discriminator."""
    wanted = hashes(LocalStore(root), plan_of(root).base.path)
    checkpoints: dict[int, bytes] = {}
    inputs = ("sources", "selections", "edits", "quality")
    store, plan = copied(root, tmp_path / "whole", *inputs), plan_of(tmp_path / "whole")
    manifest = pretrain(store, plan, on_checkpoint=checkpoints.__setitem__)
    assert manifest is not None and manifest.files == wanted
    assert list(checkpoints) == [1, 2, 3, 4]  # 2 concepts of 9 pairs, 4 a step
    for step, checkpoint in checkpoints.items():
        kept = History(losses=manifest.summary["losses"][:step], seconds=1000.0).within(checkpoint)
        history = History.resumed_from(kept)
        resumed = pretrain(copied(root, tmp_path / str(step), *inputs), plan, checkpoint=kept, history=history)
        assert resumed is not None and resumed.files == wanted
        assert resumed.summary["losses"] == manifest.summary["losses"] and resumed.summary["resumed"] == [step]
        assert [done["step"] for done in resumed.summary["losses"]] == list(range(1, 6))
        assert resumed.wall_seconds > 1000


def test_the_base_can_be_watched_until_it_is_committed(root: Path, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality")
    plan = plan_of(tmp_path / "farm", base__train__checkpoint_every=2)
    shown: dict[int, tuple[list[Any], bytes]] = {}

    def look(step: int) -> bool:
        keys = list(store.list("live/"))
        if keys:
            assert keys == [f"{live_base(plan)}/losses.jsonl", f"{live_base(plan)}/samples.webp"]
            rows = [json.loads(line) for line in store.get(keys[0]).decode().splitlines()]
            shown[step] = rows, store.get(keys[1])
        return False

    steps: list[int] = []
    manifest = pretrain(
        store, plan, on_progress=lambda done: steps.append(done.step), should_stop=lambda: look(len(steps))
    )
    assert manifest is not None and steps == [2, 4, 5]
    assert {step: rows for step, (rows, _) in shown.items()} == {1: manifest.summary["losses"][:1]}
    picture = PIL.Image.open(io.BytesIO(shown[1][1]))
    assert picture.size == (4 * 128 + 3 * 2, 3 * 128 + 2 * 2)  # the first batch; photos, teacher and base
    assert not list(store.list("live/"))


def test_only_the_first_worker_commits(root: Path, tmp_path: Path) -> None:
    """The second one of two, in a group of its own."""
    store = copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality")
    plan = plan_of(tmp_path / "farm")
    address = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        assert pretrain(store, plan, worker=(1, 2), should_stop=lambda: pytest.fail("only the first is asked")) is None
    finally:
        torch.distributed.destroy_process_group()
    assert not list(store.list("bases/")) and not list(store.list("live/"))


def test_the_base_can_be_read_again(store: Store, plan: Plan) -> None:
    config, weights = read_base(store, plan.base.path)
    assert config == GeneratorConfig(channels=8) == GeneratorConfig(**document(store, plan.base.path, "config.json"))
    Generator(config).load_state_dict(weights)
    metrics = document(store, plan.base.path, "metrics.json")
    assert list(metrics) == ["charcoal", "cyanotype"]
    assert all(scores["n"] == 12 for scores in metrics.values())
    picture = PIL.Image.open(io.BytesIO(store.get(f"{plan.base.path}/preview.webp")))
    assert picture.size == (6 * 128 + 5 * 2, 6 * 128 + 5 * 2)  # six photos; photos, teacher and base of two concepts


def test_a_rank_search_resumes_from_every_round(root: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rounds than so narrow a network would have."""
    monkeypatch.setattr(ranks, "thresholds", lambda generator: dict.fromkeys(crucial_layers(generator), 4))
    store = LocalStore(root)
    states: list[SearchState] = []
    rounds = search(store, plan, "night", on_round=states.append)
    assert [set(done.ranks.values()) for done in rounds] == [{1}, {2}, {4}]
    assert [list(state.rounds) for state in states] == [rounds[:1], rounds[:2], rounds[:3]]
    for reached in range(1, 4):
        start = SearchState.from_files(states[reached - 1].to_files(), scale=plan.config.adapters.lora.scale)
        later: list[SearchState] = []
        assert search(store, plan, "night", start=start, on_round=later.append) == rounds
        assert [list(state.rounds) for state in later] == [rounds[: number + 1] for number in range(reached, 3)]
        for state, wanted in zip(later, states[reached:], strict=True):
            assert state.to_files() == wanted.to_files()


def test_a_search_state_comes_back_exactly() -> None:
    from e2gan.lora import new_adapter
    from e2gan.model import build_generator

    generator = build_generator(GeneratorConfig(channels=8), seed=0)
    layers = dict.fromkeys(crucial_layers(generator), 2)
    adapter = new_adapter(generator, layers, scale=1.5, seed=3)
    state = SearchState(rounds=[RankRound(ranks=layers, score=0.1 + 0.2)], adapter=adapter)
    files = state.to_files()
    again = SearchState.from_files(files, scale=1.5)
    assert again.rounds == state.rounds
    assert again.adapter is not None and (again.adapter.ranks, again.adapter.scale) == (layers, 1.5)
    assert again.adapter.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert again.adapter.tensors[name].dtype == torch.float32
        assert torch.equal(again.adapter.tensors[name], tensor)
    assert again.to_files() == files


def test_thresholds_follow_the_layers_sizes() -> None:
    with torch.device("meta"):
        found = ranks.thresholds(Generator(GeneratorConfig()))
    by_hand = {"stem": 1, "down1": 4, "down2": 16, "up1": 16, "up2": 4, "head": 1, "transformer.0.down": 32}
    assert {name: found[name] for name in by_hand} == by_hand
    linear = ("transformer.0.self", "transformer.0.feed")
    assert {rank for name, rank in found.items() if name.startswith(linear)} == {1}
    assert not any(name.startswith("residual") for name in found)


def test_searched_ranks_are_merged_by_layer(tmp_path: Path, plan: Plan) -> None:
    def rounds(*scores: float, **layers: int) -> list[RankRound]:
        return [RankRound(ranks={k: min(v, 2**i) for k, v in layers.items()}, score=s) for i, s in enumerate(scores)]

    store = LocalStore(tmp_path)
    searched = {"night": rounds(3.0, 2.0, 2.5, a=1, b=8), "fog": rounds(1.0, 2.0, a=4, b=1)}
    manifest = commit_ranks(store, plan, searched, wall_seconds=0)
    assert read_ranks(store, plan) == {"a": 1, "b": 2} == manifest.summary["ranks"]
    written = document(store, plan.ranks.path, "ranks.json")
    assert written["score"] == "fd_untrained"
    assert list(written["concepts"]) == ["fog", "night"]
    assert [done["score"] for done in written["concepts"]["night"]] == [3.0, 2.0, 2.5]


def photos_in(store: Store, plan: Plan, concept: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Test photos and their edits in -1..1."""
    ids = document(store, plan.selection.path, "selection.json")["test"]
    stacks = [table(store, plan.sources.path), table(store, plan.edits(concept).path)]
    photos, edits = (torch.from_numpy(np.stack([images[i] for i in ids])).permute(0, 3, 1, 2) for images in stacks)
    return photos / 127.5 - 1, edits / 127.5 - 1


def merged(store: Store, plan: Plan, concept: str) -> dict[str, torch.Tensor]:
    """The base's weights plus alpha/r times B A, by plain matrix products, from the files as published."""
    files = open_artifact(store, plan.adapter(concept).path)
    config = json.loads(files.read("adapter_config.json"))
    half = safetensors.torch.load(files.read("adapter_model.safetensors"))
    weights = safetensors.torch.load(store.get(f"{plan.base.path}/generator.safetensors"))
    assert config["base_model_name_or_path"] == plan.base.digest
    assert all(tensor.dtype == torch.float16 for tensor in half.values())
    for layer, rank in config["rank_pattern"].items():
        a, b = (half[f"base_model.model.{layer}.lora_{side}.weight"].float() for side in "AB")
        weight = weights[f"{layer}.weight"]
        if layer in ("up1", "up2", "transformer.0.up"):  # transposed: in, out, k, k
            delta = torch.stack([b.flatten(1) @ a[i].flatten(1) for i in range(len(weight))]).view_as(weight)
        else:
            delta = (b.flatten(1) @ a.flatten(1)).view_as(weight)
        assert a.shape[1 if layer in ("up1", "up2", "transformer.0.up") else 0] == rank
        weight += config["alpha_pattern"][layer] / rank * delta
    return weights


@pytest.mark.parametrize("concept", ["sepia", "night"])
def test_an_adapters_scores_are_those_of_its_files(store: Store, plan: Plan, concept: str) -> None:
    scores = document(store, plan.adapter(concept).path, "metrics.json")
    assert list(scores) == [
        *("n", "l1", "l1_untouched", "psnr", "ssim", "frechet", "kid", "warning", "interval", "l1_base", "gain"),
        *("frechet_base", "frechet_untouched", "variety", "variety_teacher", "contrast", "contrast_teacher"),
    ]
    assert list(scores["frechet"]) == ["fd_untrained"] and scores["frechet"]["fd_untrained"] >= 0
    photos, edits = photos_in(store, plan, concept)
    assert scores["n"] == len(photos) == 12
    assert scores["l1_untouched"] == pytest.approx((photos - edits).abs().mean().item(), abs=1e-6)
    text = safetensors.torch.load(open_artifact(store, plan.adapter(concept).path).read("text.safetensors"))["text"]
    assert text.shape == (77, 768)

    generator = Generator(GeneratorConfig(channels=8)).eval()
    found: dict[str, float] = {}
    each: dict[str, torch.Tensor] = {}
    for name, weights in (("adapter", merged(store, plan, concept)), ("base", read_base(store, plan.base.path)[1])):
        generator.load_state_dict(weights)
        half = uses_bf16(TrainConfig(), torch.device("cpu"))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            edited = generator(photos, text[None]).float()
        edited = ((edited + 1) * 127.5).round() / 127.5 - 1
        each[name] = (edited - edits).abs().mean(dim=(1, 2, 3))
        found[name] = each[name].mean().item()
    assert scores["l1"] == pytest.approx(found["adapter"], abs=1e-3)
    assert scores["l1"] < found["base"] - 0.01, "the adapter must have learned something for this to mean anything"
    assert scores["l1_base"] == pytest.approx(found["base"], abs=1e-3)
    gains = each["base"] - each["adapter"]
    assert scores["gain"] == pytest.approx(gains.mean().item(), abs=2e-3)
    for name, values in (("l1", each["adapter"]), ("gain", gains)):
        low, high = scores["interval"][name]
        half = 1.96 * values.std(correction=0).item() / 12**0.5
        assert (low + high) / 2 == pytest.approx(values.mean().item(), abs=2e-3 + half / 4)
        assert high - low == pytest.approx(2 * half, rel=0.25, abs=1e-3)


def test_an_adapters_files(store: Store, plan: Plan) -> None:
    artifact = open_artifact(store, plan.adapter("sepia").path)
    assert sorted(artifact.manifest.files) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("metrics.json", "preview.webp", "text.safetensors"),
    ]
    picture = PIL.Image.open(io.BytesIO(artifact.read("preview.webp")))
    assert picture.size == (6 * 128 + 5 * 2, 3 * 128 + 2 * 2)  # six photos; photos, teacher and adapter
    card = artifact.read("README.md").decode()
    assert plan.base.digest in card and "in the style sepia" in card and "`procedural`" in card
    assert f"{artifact.manifest.summary['metrics']['l1']:.3f}" in card
    assert artifact.manifest.summary["pairs"] == 9
    assert artifact.manifest.summary["losses"][-1]["step"] == 7  # 3 epochs of 9 pairs, 4 a step


def test_an_adapter_made_elsewhere_has_the_same_bytes(root: Path, tmp_path: Path, plan: Plan) -> None:
    store = copied(root, tmp_path / "farm", "sources", "selections", "edits", "quality", "bases", "ranks")
    torch.manual_seed(1)  # global random state decides nothing
    steps: list[int] = []
    manifest = adapt(store, plan, "sepia", on_progress=lambda done: steps.append(done.step))
    assert manifest.files == hashes(LocalStore(root), plan.adapter("sepia").path)
    assert steps[-1] == 7


ADAPTER = "scratch/adapter-{}/checkpoint.safetensors"


def trainable(root: Path, target: Path) -> LocalStore:
    return copied(root, target, "sources", "selections", "edits", "quality", "bases", "ranks")


def stop_at(step: int) -> Callable[[], bool]:
    """Says so at that one of the reports, which come every step."""
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) == step

    return should_stop


def test_an_adapter_stopped_again_and_again_has_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """Stopped after two steps of its own each time, by whoever trains it."""
    store, plan = trainable(root, tmp_path / "farm"), plan_of(root, adapters__train__checkpoint_every=1)
    key = ADAPTER.format(plan.adapter("sepia").digest)
    for step in (2, 4, 6):
        with pytest.raises(Stopped, match=f"step {step}$"):
            adapt(store, plan, "sepia", should_stop=stop_at(2))
        assert list(store.list("scratch/")) == [key] and not list(store.list("adapters/"))
    steps: list[int] = []
    manifest = adapt(store, plan, "sepia", on_progress=lambda done: steps.append(done.step), should_stop=stop_at(9))
    assert steps == [7]
    assert manifest.files == hashes(LocalStore(root), plan.adapter("sepia").path)
    assert [row["step"] for row in manifest.summary["losses"]] == [1, 2, 3, 4, 5, 6, 7]
    assert manifest.summary["resumed"] == [2, 4, 6]
    assert not list(store.list("scratch/"))


def test_an_adapters_checkpoint_is_kept_as_it_goes_on(root: Path, tmp_path: Path) -> None:
    """As it is when its worker is killed, here by its own report."""
    store, plan = trainable(root, tmp_path / "farm"), plan_of(root, adapters__train__checkpoint_every=2)

    def die(done: Any) -> None:
        if done.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(store, plan, "sepia", on_progress=die)
    manifest = adapt(store, plan, "sepia")
    assert manifest.files == hashes(LocalStore(root), plan.adapter("sepia").path)
    assert manifest.summary["resumed"] == [4]


@pytest.mark.parametrize("broken", ["cut off", "changed", "no checkpoint", "without a history", "of another adapter"])
def test_an_adapters_checkpoint_that_does_not_fit_is_passed_over(
    root: Path, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, plan = trainable(root, tmp_path / "farm"), plan_of(root, adapters__train__checkpoint_every=1)
    key, other = (ADAPTER.format(plan.adapter(concept).digest) for concept in ("sepia", "charcoal"))
    for concept in ("sepia", "charcoal"):
        with pytest.raises(Stopped):
            adapt(store, plan, concept, should_stop=stop_at(3))
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(
        key,
        {
            "cut off": store.get(key)[:-100],
            "changed": bytes(data),
            "no checkpoint": b"not a checkpoint",
            "without a history": save_weights({"a": torch.zeros(2)}, training="{}"),
            "of another adapter": store.get(other),
        }[broken],
    )
    with caplog.at_level(logging.WARNING):
        manifest = adapt(store, plan, "sepia")
    warning, *more = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{key} is passed over: ") and not more
    assert manifest.files == hashes(LocalStore(root), plan.adapter("sepia").path)
    assert manifest.summary["resumed"] == [] and manifest.summary["losses"][0]["step"] == 1
    assert list(store.list("scratch/")) == [other]


def test_only_good_adapters_are_published(root: Path, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "farm", "adapters", "bases")
    strict, plan = plan_of(root, adapters__max_l1_ratio=0.01), plan_of(root)
    assert publish(store, strict, "sepia") is None
    assert Registry(store).list() == {}
    entry = publish(store, plan, "sepia")
    assert entry is not None and Registry(store).get("sepia") == entry
    assert (entry.version, entry.adapter, entry.base) == (1, plan.adapter("sepia").path, plan.base.digest)
    assert entry.metrics == document(store, entry.adapter, "metrics.json")
    assert publish(store, plan, "sepia") == entry
    scores = entry.metrics
    exactly = plan_of(root, adapters__max_l1_ratio=scores["l1"] / scores["l1_untouched"] * 1.000001)
    assert publish(store, exactly, "sepia") == entry


# Folders of photographs


def ramp(height: int = 32, width: int = 32, seed: int = 0) -> Image:
    """A smooth picture, its red growing to the right and its green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 7 % 256, y * 7 % 256, np.full_like(x, 40 * seed)], axis=-1).astype(np.uint8)


def folder_plan(folder: Path, **changes: Any) -> Plan:
    split = {"train": 0.6, "validation": 0.2, "test": 0.2}
    settings = {"kind": "folder", "path": str(folder), "size": 32, "crops_per_photo": 2, "split": split, **changes}
    return plan_of(folder / "unused", sources=settings)


def test_a_folder_with_every_kind_of_file(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = {name: PIL.Image.fromarray(ramp(seed=seed)) for seed, name in enumerate("abcdef")}
    pictures["a"].save(folder / "plain.png")
    pictures["b"].convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    pictures["c"].quantize(64).save(folder / "palette.png")
    clear = pictures["d"].copy()
    clear.putalpha(PIL.Image.fromarray(np.repeat(np.array([[0] * 16 + [255] * 16], np.uint8), 32, axis=0)))
    clear.save(folder / "alpha.png")
    pictures["e"].convert("L").save(folder / "grey.png")
    orientation = PIL.Image.Exif()
    orientation[0x0112] = 6  # turn a quarter to the right to see it upright
    upright = ramp(40, 32, seed=5)
    PIL.Image.fromarray(np.rot90(upright).copy()).save(folder / "turned.png", exif=orientation)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "truncated.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "truncated.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("not a picture")
    PIL.Image.fromarray(ramp(31, 90)).save(folder / "small.png")
    (folder / "copy.png").write_bytes((folder / "plain.png").read_bytes())
    (folder / "notes.txt").write_text("no photograph, nor called one")

    store, plan = LocalStore(tmp_path / "farm"), folder_plan(folder, crops_per_photo=1)
    manifest = ingest(store, plan, no_progress)
    written = document(store, plan.sources.path, "photos.json")
    assert written["skipped"] == manifest.summary["skipped"]
    reasons = {skip["name"]: skip["reason"] for skip in written["skipped"]}
    assert list(reasons) == ["plain.png", "small.png", "text.jpg", "truncated.jpg"]  # copy.png comes before plain.png
    assert reasons["plain.png"] == "the same file as copy.png"
    assert reasons["small.png"] == "90 x 31 is smaller than sources.size, 32"
    assert reasons["text.jpg"].startswith("not a JPEG")
    assert reasons["truncated.jpg"].startswith("the image file is damaged")
    images = table(store, plan.sources.path)
    assert list(images) == [f"{name}-000" for name in ("alpha", "cmyk", "copy", "grey", "palette", "turned")]

    def apart(name: str, wanted: Any) -> float:
        return float(np.abs(images[f"{name}-000"].astype(float) - np.asarray(wanted)).max())

    assert apart("copy", ramp()) == 0
    assert apart("palette", pictures["c"].quantize(64).convert("RGB")) == 0
    assert apart("cmyk", pictures["b"]) < 12
    assert apart("grey", np.asarray(pictures["e"].convert("L"))[..., None]) == 0
    on_white = ramp(seed=3)
    on_white[:, :16] = 255
    assert apart("alpha", on_white) == 0
    assert apart("turned", upright[4:36]) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_folder_without_usable_photographs_is_told(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").write_text("not a picture")
    store = LocalStore(tmp_path / "farm")
    with pytest.raises(UserError) as caught:
        ingest(store, folder_plan(folder), no_progress)
    assert str(caught.value) == (
        f"sources.path: none of the {count} images in {folder} can be used, first 0.jpg (not a JPEG, PNG, WebP, BMP, "
        "TIFF or GIF image); name a folder of photographs of at least 32 x 32 pixels."
    )
    assert not list(store.list())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_photographs_to_split(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        PIL.Image.fromarray(ramp(seed=number)).save(folder / f"{number}.png")
    with pytest.raises(UserError, match=rf"^sources\.path: {count} usable photographs? cannot be split .* three\.$"):
        ingest(LocalStore(tmp_path / "farm"), folder_plan(folder), no_progress)


def test_more_clusters_than_training_images(root: Path, tmp_path: Path) -> None:
    store, plan = copied(root, tmp_path / "farm", "sources"), plan_of(root, selection__clusters=25)
    with pytest.raises(UserError) as caught:
        select(store, plan)
    assert str(caught.value) == (
        "selection.clusters: 25 clusters need as many training images, there are 24; set selection.clusters to at "
        "most 24 or give more photographs."
    )


def test_a_test_split_too_small_to_judge_on_is_told_before_anything_is_edited(tmp_path: Path) -> None:
    store, plan = LocalStore(tmp_path), plan_of(tmp_path, sources__crops_per_photo=1, sources__split={})
    with pytest.raises(UserError, match=r"^sources\.split\.validation: 1 image is too few to judge on, at least 2"):
        prepare(store, plan)
    assert not list(store.list("edits/")) and not list(store.list("selections/"))


def test_weights_that_are_missing_are_told(root: Path, tmp_path: Path) -> None:
    store = copied(root, tmp_path / "farm")
    nowhere = str(tmp_path / "nowhere")
    for embedding in ("clip", "onnx"):
        with pytest.raises(UserError, match=r"^selection\.path: "):
            select(store, plan_of(root, selection={"clusters": 5, "embedding": embedding, "path": nowhere}))
    from farm.stages.judge import extractor, text_embedding

    with pytest.raises(UserError, match=r"^evaluation\.inception: "):
        extractor(nowhere)
    clip = plan_of(root, text={"encoder": "clip", "path": nowhere}).config
    with pytest.raises(UserError, match=r"^text\.path: "):
        text_embedding(clip, "a prompt")


def test_a_prompt_without_words_is_told(plan: Plan) -> None:
    from farm.stages.judge import text_embedding

    with pytest.raises(UserError, match=r"prompt"):
        text_embedding(plan.config, "!?")
    with pytest.raises(UserError, match=r"so 'and the moon' would be cut off; shorten the prompt"):
        text_embedding(plan.config, "word " * 75 + "and the moon")
