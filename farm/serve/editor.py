"""An editing replica, without Ray: the registry followed, the adapters in memory, photos edited."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.pairs import Image
from farm.errors import UserError
from farm.serve.bank import LOADERS, Bank, Loaded
from farm.serve.editing import Answer, Edited, UnavailableError, Wanted
from farm.serve.engines import Engine, Merging, Stacking
from farm.serve.published import Published, UnknownConceptError
from farm.serve.settings import Settings
from farm.signing import open_keys
from farm.store import open_store

_log = logging.getLogger(__name__)

HEALTHY_SECONDS = 10.0
"""For how long an edit that succeeded shows that others will."""
PROBES = 8
"""Concepts that a health check tries at most: that an adapter is damaged is not the replica's fault."""

_SMALLEST = np.full((16, 16, 3), 127, np.uint8)


@dataclass(frozen=True, eq=False)
class Job:
    """A photo that waits for its edit, and what is ready for it. milliseconds: of loading. since: when it began to."""

    loaded: Loaded
    photo: Image
    milliseconds: float
    since: float


class Editor:
    """Edits photos with the published adapters of a store.

    together: collects jobs to edit in one batch; the photo alone when None.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.name = uuid4().hex[:8]
        torch.set_num_threads(settings.cpus)
        keys = open_keys(None, settings.public_keys)
        self.published = Published(open_store(settings.store), keys, seconds=settings.watch_seconds)
        self.bank = Bank(
            self.published, self._engine, byte_budget=settings.cache_mb * 1_000_000, pinned=settings.pinned
        )
        self.collect: Callable[[Job], Awaitable[Edited]] | None = None
        self._loaders = ThreadPoolExecutor(LOADERS, "load")
        self._one = ThreadPoolExecutor(1, "edit")  # first come, first served
        self._changed = threading.Event()
        self._counts: Counter[str] = Counter()
        self._edited_at = float("-inf")

    def start(self) -> None:
        """Load the base, follow the registry, and load adapters while there is time."""
        try:
            self.check()
        except (UserError, OSError) as error:
            _log.error("nothing can be edited yet: %s", error)
        self.published.listen(self._changed.set)
        for work in (self._renew, self._prefetch):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        self.published.follow()

    async def edit(self, wanted: Wanted, photo: Image) -> Answer:
        """Edit a photo, uint8 `[h, w, 3]` with sides as the network takes them.

        What the client or the store is to blame for is an answer, not an exception: Ray Serve would log a traceback.
        """
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            loaded = await loop.run_in_executor(
                self._loaders, self.bank.get, wanted.concept, wanted.version, wanted.strength
            )
        except UnknownConceptError as error:
            return error
        except (UserError, OSError) as error:
            _log.error("%s cannot be loaded: %s", wanted.concept, error)
            return UnavailableError(wanted.concept)
        now = time.perf_counter()
        job = Job(loaded, photo, (now - began) * 1e3, now)
        return await self.collect(job) if self.collect else (await self.together([job]))[0]

    async def together(self, jobs: Sequence[Job]) -> list[Edited]:
        """Edit photos, those of one base in one batch where the engine does that."""
        return await asyncio.get_running_loop().run_in_executor(self._one, self._together, jobs)

    def check(self) -> dict[str, Any]:
        """Make sure that a real edit succeeds, or did so lately; the report.

        With nothing published there is nothing to edit.

        Raises:
            UserError, OSError: no adapter can be loaded.
        """
        if time.monotonic() - self._edited_at > HEALTHY_SECONDS:
            failed: Exception | None = None
            for concept in islice(self.published.entries, PROBES):
                try:
                    self.bank.get(concept).edit(_SMALLEST)
                except (UserError, OSError) as error:
                    failed = error
                else:
                    failed = None
                    break
            if failed:
                raise failed
            self._edited_at = time.monotonic()
        return self.report()

    def report(self) -> dict[str, Any]:
        """The replica's figures."""
        return {"replica": self.name, **self._counts, **self.bank.report(), "age": self.published.age}

    def pin(self, concept: str, pinned: bool) -> None:
        self.bank.pin(concept, pinned)

    def evict(self, concept: str) -> None:
        self.bank.evict(concept)

    def reload(self) -> None:
        """Look at the registry now, and load what changed."""
        self.published.refresh()
        self.bank.renew()

    def _together(self, jobs: Sequence[Job]) -> list[Edited]:
        edited: dict[int, Edited] = {}
        for engine in {id(job.loaded.engine): job.loaded.engine for job in jobs}.values():
            places = [place for place, job in enumerate(jobs) if job.loaded.engine is engine]
            began = time.perf_counter()
            images = engine.edit([(jobs[place].loaded.ready, jobs[place].photo) for place in places])
            ended = time.perf_counter()
            self._edited_at = time.monotonic()
            self._counts.update(batches=1, photos=len(places))
            report = self.report()
            for place, image in zip(places, images, strict=True):
                job = jobs[place]
                edited[place] = Edited(
                    image=image,
                    version=job.loaded.version,
                    digest=job.loaded.digest,
                    base=job.loaded.base,
                    milliseconds={
                        "load": job.milliseconds,
                        "wait": (began - job.since) * 1e3,
                        "edit": (ended - began) * 1e3,
                    },
                    report=report,
                )
        return [edited[place] for place in range(len(jobs))]

    def _engine(self, config: GeneratorConfig, weights: dict[str, Tensor]) -> Engine:
        if self._settings.gpus:
            return Stacking(config, weights)
        sizes = [size.split("x") for size in self._settings.compiled]
        return Merging(config, weights, compiled=[(int(height), int(width)) for width, height in sizes])

    def _prefetch(self) -> None:
        # Requests come first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        self.bank.prefetch(self._settings.popular)

    def _renew(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            try:
                self.bank.renew()
            except Exception:  # a mistake of ours must not end it
                _log.exception("the adapters in memory are as they were")
