"""The editing endpoint against the bare model, as JSON lines: one run, on this machine's loopback, bounded in time.

    python bench/serve.py [--side 256] [--concepts 260] [--seconds 5] [--rounds 5] [--quick]

A store with random adapters at the paper's ranks on a random base is made, Ray Serve started on it, and asked by this
process. `ratio` is to the bare model: one process that does nothing but edit, on the same CPUs, in turn with the
endpoint, so that what disturbs one disturbs the other; `cpu_ratio` is the same of CPU time an image, this client's
share included, which a machine that others use changes least. Latencies are from a request's first byte to its answer's
last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from e2gan.config import GeneratorConfig
from e2gan.lora import Adapter, new_adapter, searched_ranks
from e2gan.lora_peft import save
from e2gan.model import Generator, build_generator
from e2gan.pairs import Image
from farm.artifacts import Spec, commit
from farm.images import encode
from farm.registry import Registry
from farm.serve.access import new_key
from farm.serve.settings import Settings
from farm.store import LocalStore

KEY = new_key()


@dataclass(frozen=True)
class Answer:
    """What came back. seconds: to its last byte. first: to its first."""

    status: int
    seconds: float
    first: float
    headers: dict[str, str]
    body: bytes


class Client:
    """As little of an HTTP client as will do, so that the CPU is left to the endpoint."""

    def __init__(self, port: int, photo: bytes) -> None:
        self._port, self._photo = port, photo
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def edit(self, concept: str) -> Answer:
        return await self.ask("POST", f"/v1/edit/{concept}", self._photo)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        began = time.perf_counter()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{method} {path} HTTP/1.1\r\nHost: farm\r\nAccept: image/jpeg\r\nX-API-Key: {KEY[0]}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        told = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        first = time.perf_counter() - began
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in told[1:])}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        self._idle.append((reader, writer))
        return Answer(int(told[0].split()[1]), time.perf_counter() - began, first, headers, data)


class Farm:
    """The store: a base, and concepts that are published when they are asked for."""

    def __init__(self, root: Path, channels: int) -> None:
        import safetensors.torch

        self.store = LocalStore(root)
        self.config = GeneratorConfig(channels=channels, init="normal")
        self.base = build_generator(self.config, seed=0).requires_grad_(False).eval()
        files = {
            "config.json": json.dumps(asdict(self.config)).encode(),
            "generator.safetensors": safetensors.torch.save(self.base.state_dict()),
        }
        self.digest = commit(
            self.store, Spec(stage="pretrain", version=1, folder="bases"), files, wall_seconds=0
        ).digest

    def publish(self, number: int) -> str:
        import safetensors.torch

        concept, random = f"concept-{number}", torch.Generator().manual_seed(number)
        adapter, text = random_adapter(self.base, random)
        files = save(adapter, base=self.digest) | {"text.safetensors": safetensors.torch.save({"text": text})}
        spec = Spec(stage="adapt", version=1, folder=f"adapters/{concept}", seed=number)
        made = commit(self.store, spec, files, wall_seconds=0)
        chosen = {"adapter": made.path, "digest": made.digest, "base": self.digest, "metrics": {}}
        Registry(self.store).publish(concept, **chosen)
        return concept


def random_adapter(base: Generator, random: torch.Generator) -> tuple[Adapter, torch.Tensor]:
    empty = new_adapter(base, searched_ranks(base), seed=0)
    tensors = {name: 0.02 * torch.randn(t.shape, generator=random) for name, t in empty.tensors.items()}
    text = torch.randn(base.config.text_tokens, base.config.text_width, generator=random)
    return Adapter(ranks=empty.ranks, scale=1.0, tensors=tensors), text


def photo_of(side: int) -> Image:
    from skimage.data import astronaut
    from skimage.transform import resize

    return np.rint(resize(astronaut(), (side, side), anti_aliasing=True) * 255).astype(np.uint8)


def zipf(count: int, seed: int) -> Iterator[int]:
    """Numbers of concepts, the k-th as often as 1/k."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, count + 1)
    while True:
        yield from random.choice(count, 1000, p=weights / weights.sum()).tolist()


@dataclass(frozen=True)
class Speed:
    """Images a second, and the seconds of CPU that an image cost all processes that had a part in it."""

    images: float
    cpu: float


async def closed_loop(ask: Callable[[], Any], seconds: float, at_once: int) -> Speed:
    """Answers a second when so many are always asked for at once."""
    end, done = time.perf_counter() + seconds, 0

    async def keep_asking() -> None:
        nonlocal done
        while time.perf_counter() < end:
            answer = await ask()
            assert answer.status == 200, answer
            done += 1

    began, cpu = time.perf_counter(), cpu_seconds()
    await asyncio.gather(*(keep_asking() for _ in range(at_once)))
    return Speed(done / (time.perf_counter() - began), (cpu_seconds() - cpu) / done)


def cpu_seconds() -> float:
    """What this process and all that it started have used."""
    import psutil

    times = [p.cpu_times() for p in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def open_loop(ask: Callable[[], Any], seconds: float, rate: float) -> list[Answer]:
    """The answers when so many are asked for a second, at random moments, whatever becomes of them."""
    random = np.random.default_rng(0)
    asked: list[asyncio.Task[Answer]] = []
    began, at = time.perf_counter(), 0.0
    while at < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        asked.append(asyncio.ensure_future(ask()))
        at += random.exponential(1 / rate)
    return await asyncio.gather(*asked)


def bare(farm: Farm, photo: Image, concept: int, *, compiled: bool) -> Callable[[float], Speed]:
    """The model alone, in this process."""
    from farm.serve.engines import Merging

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    engine = Merging(farm.config, farm.base.state_dict(), compiled=[photo.shape[:2]] if compiled else [])
    ready = engine.ready(*random_adapter(farm.base, torch.Generator().manual_seed(concept)))

    def measure(seconds: float) -> Speed:
        began, cpu, done = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < seconds:
            engine.edit([(ready, photo)])
            done += 1
        return Speed(done / (time.perf_counter() - began), (time.process_time() - cpu) / done)

    return measure


def ratio(above: list[Speed], below: list[Speed], what: str) -> float:
    """The median over the rounds."""
    return round(statistics.median(getattr(a, what) / getattr(b, what) for a, b in zip(above, below, strict=True)), 3)


def quantiles(answers: list[Answer]) -> dict[str, float | None]:
    """Median and 99th percentile of the durations, in milliseconds."""
    taken = [1e3 * answer.seconds for answer in answers]
    return {f"p{q}": round(float(np.percentile(taken, q)), 1) if taken else None for q in (50, 99)}


def editing_process() -> Any:
    """The editing replica's process."""
    import psutil

    return next(p for p in psutil.process_iter() if "Editing" in " ".join(p.cmdline()[:1]))


async def measure(args: argparse.Namespace, farm: Farm, port: int) -> None:
    photo = photo_of(args.side)
    client = Client(port, encode(photo, "jpeg"))
    while (await client.ask("GET", "/readyz")).status != 200:
        await asyncio.sleep(0.5)
    process = editing_process()
    say(what="a replica with its base and one adapter", memory_mb=round(process.memory_full_info().uss / 1e6))
    first = await client.edit("concept-0")
    assert first.status == 200, first

    for number in range(1, args.concepts):
        name = farm.publish(number)
    published_at = time.perf_counter()
    while (await client.edit(name)).status == 404:
        await asyncio.sleep(0.05)
    say(what="from the last of them published to served", seconds=round(time.perf_counter() - published_at, 2))

    numbers = zipf(args.concepts, seed=1)
    for number in range(args.concepts):  # all in memory, as far as they go
        await client.edit(f"concept-{number}")
    for number in itertools.islice(numbers, 40):
        await client.edit(f"concept-{number}")
    alone = bare(farm, photo, 0, compiled=not args.eager)
    alone(1)
    speeds: dict[str, list[Speed]] = {"bare model": [], "one concept": [], f"{args.concepts} concepts, Zipf": []}
    bare_speeds, one, many = speeds.values()
    for _ in range(args.rounds):
        bare_speeds.append(await asyncio.to_thread(alone, args.seconds))
        one.append(await closed_loop(lambda: client.edit("concept-0"), args.seconds, args.at_once))
        many.append(await closed_loop(lambda: client.edit(f"concept-{next(numbers)}"), args.seconds, args.at_once))
    for name, found in speeds.items():
        say(
            what=name,
            images_per_second=round(statistics.median(speed.images for speed in found), 2),
            ratio=ratio(found, bare_speeds, "images"),
            to_one=ratio(found, one, "images"),
            cpu_milliseconds=round(1e3 * statistics.median(speed.cpu for speed in found), 1),
            cpu_ratio=ratio(bare_speeds, found, "cpu"),
            cpu_to_one=ratio(one, found, "cpu"),
        )
    capacity = statistics.median(speed.images for speed in many)

    warm, cold = [], []
    for number in range(args.cold):
        await client.edit(f"concept-{number}")
        warm.append((await client.edit(f"concept-{number}")).first)
        assert (await client.ask("POST", f"/v1/admin/evict/concept-{number}")).status == 200
        cold.append((await client.edit(f"concept-{number}")).first)
    more = [1e3 * (c - w) for c, w in zip(cold, warm, strict=True)]
    say(
        what="first byte of an adapter that is not in memory, over one that is",
        milliseconds=round(statistics.median(more), 1),
        worst=round(max(more), 1),
        warm=round(1e3 * statistics.median(warm), 1),
    )

    for share in (0.7, 2.0):
        answers = await open_loop(lambda: client.edit(f"concept-{next(numbers)}"), args.load_seconds, share * capacity)
        kept = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status == 503]
        assert len(kept) + len(refused) == len(answers), {answer.status for answer in answers}
        assert all("retry-after" in answer.headers for answer in refused)
        say(
            what=f"{share:g} of what it can do, at random moments",
            requests=len(answers),
            refused=round(len(refused) / len(answers), 3),
            milliseconds=quantiles(kept),
            refused_milliseconds=quantiles(refused),
        )

    metrics = (await client.ask("GET", "/metrics")).body.decode()
    told = {
        line.partition("{")[0].removeprefix("farm_replica_"): float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("farm_replica_")
    }
    say(
        what=f"a replica with {args.concepts} adapters",
        memory_mb=round(process.memory_full_info().uss / 1e6),
        adapters_mb=round(told["bytes"] / 1e6),
        budget_mb=args.cache_mb,
        in_memory=told["adapters"],
        merged=told["ready"],
        hits=round(told["hits_total"] / (told["hits_total"] + told["misses_total"]), 3),
    )


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--concepts", type=int, default=260)
    parser.add_argument("--cache-mb", type=int, default=1000, help="memory for adapters")
    parser.add_argument("--at-once", type=int, default=3, help="requests under way while throughput is measured")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement of throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load-seconds", type=float, default=40)
    parser.add_argument("--cold", type=int, default=15, help="adapters loaded anew")
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)), help="of the editing replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without compiled graphs")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small network, few concepts, seconds")
    args = parser.parse_args()
    if args.quick:
        args.side, args.channels, args.concepts, args.cold = 64, 8, 6, 2
        args.seconds, args.rounds, args.load_seconds, args.eager = 0.5, 2, 2, True
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        farm = Farm(Path(folder), args.channels)
        farm.publish(0)
        say(machine=machine(), **{name: value for name, value in vars(args).items() if name != "quick"})
        from farm.serve import app  # Ray only after it: what keeps it on loopback is set there

        settings = {
            "store": farm.store.url,
            "max_side": args.side,
            "compiled": [] if args.eager else [f"{args.side}x{args.side}"],
            "cache_mb": args.cache_mb,
            "cpus": args.cpus,
            "replicas": args.replicas,
            "keys": [{"name": "bench", "sha256": KEY[1], "admin": True}],
        }
        with app.running(Settings.of(settings), port=port):
            asyncio.run(measure(args, farm, port))


if __name__ == "__main__":
    main()
