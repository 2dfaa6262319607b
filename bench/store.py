"""What a store takes and gives, against plain loops over the same objects, and how often it is called: JSON lines.

    python bench/store.py [--adapters 260] [--concepts 280] [--rounds 5] [--workers 1 4 16] [--stores folder gateway]

The stores are a folder on this disk and a bucket of Ceph's gateway on this machine. Publishing is what a run does
with a trained adapter: `farm.artifacts.commit` (six files, 430 kB, and a manifest), then `Registry.publish`. Reading
is what a server does with a concept it does not have: the record, the manifest and three files, all of them checked.

The plain loop moves the same objects, byte for byte, with as many workers, and does nothing else: it does not look
whether an adapter is there already, does not make sure that what it publishes is complete, and hashes nothing. In the
bucket it is boto3's `put_object` and `get_object`, with a connection a worker and all else as boto3 has it. In the
folder it writes a file beside the one it makes, syncs it, renames it and syncs the folder, which is the least that
survives a power cut; what is read there was dropped from the page cache. A worker takes one adapter after another.
Both take turns, a share of the adapters each, who is first alternates: `of_plain` is the plain loop's seconds over
ours, the median of the rounds.

Calls: a finished farm of `--concepts`, its artifacts of the usual sizes but made up, and what a publication, a cold
read, `farm status`, a run with nothing to do and the server's listing ask of the store. In the bucket these are
requests, and the same again with 20 ms added to each, as from another region.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cluster import Counting, config_of
from machine import machine, sayer

from farm.artifacts import MANIFEST, Manifest, Spec, commit, open_artifact
from farm.errors import UserError
from farm.objects import Store
from farm.registry import Entry, Registry
from farm.store import LocalStore, open_store
from farm.threads import beside, in_threads

sys.path.append(str(Path(__file__).parents[1] / "tests" / "integration"))
import rgw

SIZES = {
    "adapter_config.json": 1_500,
    "adapter_model.safetensors": 185_000,
    "text.safetensors": 236_600,
    "metrics.json": 1_500,
    "preview.webp": 12_000,
    "README.md": 3_000,
}
"""Bytes of an adapter's files at the paper's width."""
READ = ("adapter_config.json", "text.safetensors", "adapter_model.safetensors")
"""Those that a server reads."""
SCORES = {"l1": 0.05, "l1_untouched": 0.2, "l1_base": 0.1, "gain": 0.05, "interval": {"gain": [0.04, 0.06]}, "n": 50}
CHECKS = {"finite": True, "other_ranks": {}, "in_base": False, "latency_ms": 20.0}
LOSSES = [{"step": n, "generator": 0.1, "discriminator": 0.5} for n in range(60)]
BASE = Spec(stage="base", version=1, folder="bases", config={"name": "bench"})
DELAY_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=260)
    parser.add_argument("--concepts", type=int, default=280)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--stores", nargs="+", choices=("folder", "gateway"), default=["folder", "gateway"])
    parser.add_argument("--json", type=Path, help="a file for the lines as well")
    options = parser.parse_args()
    say = sayer(options.json)
    say(machine())
    with tempfile.TemporaryDirectory(prefix="store-") as scratch:
        for name in options.stores:
            with {"folder": a_folder, "gateway": a_gateway}[name](Path(scratch)) as place:
                for workers in options.workers:
                    for row in throughput(place, options.adapters, options.rounds, workers):
                        say({"store": name, "workers": workers, **row})
                for row in calls(place, options.concepts):
                    say({"store": name, "concepts": options.concepts, **row})


@dataclass
class Place:
    """Somewhere to keep stores. plain: writers and readers of a plain loop for so many workers, by a prefix."""

    url: Callable[[str], str]
    plain: Callable[[str, int], Any]
    requests: Counter[str] = field(default_factory=Counter)
    delay: float = 0.0
    remote: bool = False


@contextmanager
def a_folder(scratch: Path) -> Iterator[Place]:
    yield Place(lambda name: str(scratch / name), lambda name, workers: PlainFolder(scratch / name))


@contextmanager
def a_gateway(scratch: Path) -> Iterator[Place]:
    """A bucket of Ceph's gateway, with pages of a thousand keys as Amazon's."""
    import boto3

    from farm.s3_client import client_of

    os.environ |= {"AWS_ACCESS_KEY_ID": rgw.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": rgw.SECRET_KEY}
    (scratch / "ceph").mkdir()
    with rgw.ceph(scratch / "ceph", page=1000) as ceph:
        endpoint = rgw.Gateway(ceph).start().endpoint
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="farm")
        place = Place(
            lambda name: f"s3://farm/{name}?endpoint_url={endpoint}",
            lambda name, workers: PlainBucket(endpoint, name, workers),
            remote=True,
        )

        def sent(event_name: str, **_: Any) -> None:
            place.requests[event_name.rpartition(".")[2]] += 1
            time.sleep(place.delay)

        for hasty in (False, True):
            client_of(endpoint, None, hasty=hasty).meta.events.register("before-send.s3", sent)
        yield place


class PlainFolder:
    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def write(self, key: str, data: bytes) -> None:
        path = self.root / key
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent.parent)
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()


class PlainBucket:
    def __init__(self, endpoint: str, prefix: str, workers: int) -> None:
        import boto3
        from botocore.config import Config

        settings = Config(max_pool_connections=workers)
        self.client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=settings)
        self.prefix = prefix

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="farm", Key=f"{self.prefix}/{key}", Body=data)

    def read(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket="farm", Key=f"{self.prefix}/{key}")["Body"].read()
        return data


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def files_of(sizes: dict[str, int]) -> dict[str, bytes]:
    return {name: os.urandom(size) for name, size in sizes.items()}


def publish(store: Store, concept: str, files: dict[str, bytes]) -> Entry:
    """What a worker and the driver do with an adapter that has been trained."""
    spec = Spec(stage="adapter", version=1, folder=f"adapters/{concept}", inputs={"base": BASE.digest})
    summary = {"metrics": SCORES, "checks": {**CHECKS, "base": BASE.digest}, "losses": LOSSES}
    made = commit(store, spec, files, wall_seconds=1.0, summary=summary)
    release = {"adapter": made.path, "digest": made.digest, "base": BASE.digest, "metrics": SCORES}
    return Registry(store).publish(concept, **release, manifest=made)


def read(store: Store, concept: str) -> dict[str, bytes]:
    """What a server does with a concept that it does not have in memory."""
    entry = Registry(store).get(concept)
    assert entry is not None
    artifact = open_artifact(store, entry.adapter)
    return dict(zip(READ, beside(artifact.read, READ, store.at_once), strict=True))


def throughput(place: Place, adapters: int, rounds: int, workers: int) -> Iterator[dict[str, Any]]:
    """Seconds of publishing and of reading, ours and the plain loop's, in turns."""
    concepts = [f"c-{number:04d}" for number in range(adapters)]
    files = {concept: files_of(SIZES) for concept in concepts[:8]}
    given = {concept: files[concepts[number % 8]] for number, concept in enumerate(concepts)}
    ours, plain = open_store(place.url(f"ours-{workers}")), place.plain(f"plain-{workers}", workers)
    commit(ours, BASE, {"generator.safetensors": b"base"}, wall_seconds=0)
    objects = objects_of(given)
    read_keys = {
        c: [key for key in objects[c] if not key.endswith((".webp", "README.md", "metrics.json"))] for c in concepts
    }
    work: dict[str, tuple[Callable[[str], object], Callable[[str], object]]] = {
        "publish": (
            lambda c: publish(ours, c, given[c]),
            lambda c: [plain.write(key, data) for key, data in objects[c].items()],
        ),
        "read cold": (
            lambda c: read(ours, c),
            lambda c: [plain.read(key) for key in read_keys[c]],
        ),
    }
    size = -(-adapters // rounds)
    for what, both in work.items():
        seconds: list[list[float]] = [[], []]
        for number in range(rounds):
            share = concepts[number * size : (number + 1) * size]
            for which in (0, 1) if number % 2 else (1, 0):
                if what == "read cold" and not place.remote:
                    forget([ours.root, plain.root][which])  # type: ignore[attr-defined]
                seconds[which].append(timed(both[which], share, workers))
        ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]
        moved = sum(len(data) for data in objects[concepts[0]].values())
        if what == "read cold":
            moved = sum(len(objects[concepts[0]][key]) for key in read_keys[concepts[0]])
        yield {
            "what": what,
            "adapters": adapters,
            "adapters_a_second": round(adapters / sum(seconds[0]), 1),
            "plain_a_second": round(adapters / sum(seconds[1]), 1),
            "mb_a_second": round(adapters * moved / sum(seconds[0]) / 1e6, 1),
            "of_plain": round(median(ratios), 3),
            "of_plain_rounds": [round(ratio, 2) for ratio in sorted(ratios)],
        }


def timed(work: Callable[[str], object], concepts: Sequence[str], workers: int) -> float:
    with ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        for _ in pool.map(work, concepts):
            pass
        return time.perf_counter() - started


def objects_of(given: dict[str, dict[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """By concept, the objects that publishing it makes: files, manifest, record, in this order."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        commit(store, BASE, {"generator.safetensors": b"base"}, wall_seconds=0)
        found = {}
        for concept, files in given.items():
            entry = publish(store, concept, files)
            keys = [*(f"{entry.adapter}/{name}" for name in (*SIZES, MANIFEST)), f"registry/{concept}.json"]
            found[concept] = {key: store.get(key) for key in keys}
        return found


def forget(root: Path) -> None:
    """Drop what the page cache has of a folder's files."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def calls(place: Place, concepts: int) -> Iterator[dict[str, Any]]:
    """How often the store is asked, and for how long, for what is done with a finished farm."""
    from farm.progress import Screen
    from farm.run import STAGES, Run
    from farm.serve.published import Published
    from farm.status import farm_status

    url = place.url("finished")
    store, counted = open_store(url), Counter[str]()
    config = config_of(store.url, concepts, 4)
    run = Run(config, Screen())
    finish(store, run)
    watched = Counting(store, counted)
    run.store = watched
    server: list[Published] = []

    def rerun() -> None:
        again = Run(config, Screen())
        again.store = watched
        assert again.execute(STAGES, dry_run=False).report == "runs/bench/report.html"

    def status() -> None:
        rows = farm_status(watched, run.plan)["concepts"]
        assert {(row["published"], *row["stages"].values()) for row in rows} == {(1, "done", "done", "done")}

    def opened() -> None:
        server.append(Published(watched))
        Registry(store).unpublish("another")

    def renewed() -> None:
        server[0].refresh()
        assert len(server[0].entries) == concepts

    files = files_of(SIZES)
    commit(store, BASE, {"generator.safetensors": b"base"}, wall_seconds=0)
    for what, work in {
        "publish": lambda: publish(watched, "another", files),
        "read cold": lambda: read(watched, "another"),
        "status": status,
        "rerun": rerun,
        "status, of what the rerun kept": status,
        "rerun, of what the rerun kept": rerun,
        "listing, first": opened,
        "listing, one record changed": renewed,
        "listing, nothing changed": renewed,
    }.items():
        place.requests.clear()
        counted.clear()
        started, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        asked = dict(sorted((place.requests if place.remote else counted).items()))
        row = {"what": what, "calls": sum(asked.values()), "of_them": asked, "seconds": round(seconds, 3)}
        row["cpu_seconds"] = round(cpu, 3)
        if place.remote and what.startswith(("status", "rerun")):
            place.delay = DELAY_SECONDS
            started = time.perf_counter()
            work()
            place.delay = 0.0
            row["seconds_at_20_ms"] = round(time.perf_counter() - started, 3)
        yield row


def finish(store: Store, run: Any) -> None:
    """All the artifacts of a farm, made up, and their releases."""
    plan = run.plan
    ids = [concept.id for concept in plan.config.catalogue]

    def made(spec: Spec, files: dict[str, int], **summary: Any) -> Manifest:
        return commit(store, spec, files_of(files), wall_seconds=1.0, summary=summary)

    for spec in (plan.sources, plan.selection, plan.base, plan.ranks):
        made(spec, {"data.bin": 1000})

    def concept(concept_id: str) -> None:
        made(plan.quality(concept_id), {"quality.parquet": 2000}, quarantined=None)
        checks = {**CHECKS, "base": plan.base.digest}
        spec = plan.adapter(concept_id)
        adapter = made(spec, dict.fromkeys(SIZES, 1000), metrics=SCORES, checks=checks, losses=LOSSES)
        release = {"adapter": spec.path, "digest": spec.digest, "base": plan.base.digest, "metrics": SCORES}
        Registry(store).publish(concept_id, **release, manifest=adapter)

    for _ in in_threads(concept, ids):
        pass
    store.put("runs/bench/report.html", b"<p>")
    store.put("runs/bench/plan.json", json.dumps([plan.adapter(concept_id).path for concept_id in ids]).encode())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
