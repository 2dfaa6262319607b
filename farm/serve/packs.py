"""Packs for phones, offered for download: those of which every concept is still published."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import chain
from typing import Annotated
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from farm.artifacts import MANIFEST, Artifact, Manifest, find
from farm.errors import UserError
from farm.serve import openapi
from farm.serve.browsing import cached
from farm.serve.problems import BusyError, ProblemError
from farm.serve.published import Published

LOOK_SECONDS = 10.0
"""How old the list of packs may be."""
AT_ONCE = 2
"""Downloads under way at the same time: each holds a file of a pack, which may be all of it, in memory."""

Digest = Annotated[
    str, Path(pattern="^[0-9a-f]{32}$", description="A pack's digest.", examples=["5b1f9f2bd1b94d7aa6b1f1b7d0c2a3e4"])
]


class Offered(BaseModel):
    """A pack. older: concepts that are published in another version by now. download: path of it as a ZIP file."""

    digest: str = Field(examples=["5b1f9f2bd1b94d7aa6b1f1b7d0c2a3e4"])
    format: str = Field(examples=["coreml"])
    side: int = Field(description="Of its images, in pixels.", examples=[256])
    precision: str = Field(description="Of the base's weights.", examples=["fp16"])
    base: str = Field(examples=["8a5c0e2f6f0c4c7f9d0c1e2b3a495867"])
    bytes: int = Field(examples=[15_600_000])
    made_at: str = Field(examples=["2026-11-28T22:00:00+00:00"])
    concepts: list[str] = Field(examples=[["charcoal", "night"]])
    older: list[str] = Field(examples=[["night"]])
    download: str = Field(examples=["/v1/packs/5b1f9f2bd1b94d7aa6b1f1b7d0c2a3e4.zip"])


class PackRows(BaseModel):
    """The packs, newest first."""

    packs: list[Offered]


class Packs:
    """The packs of a store, looked for at most every few seconds.

    One with a concept that was taken out of service is not offered, and neither is one that is damaged or that none of
    the keys signed. offers: none at all without it.
    """

    def __init__(self, published: Published, *, offers: bool = True) -> None:
        self._published = published
        self._offers = offers
        self._looking = threading.Lock()
        self._manifests: dict[str, Manifest | None] = {}
        self._looked_at = float("-inf")

    def offered(self) -> list[Offered]:
        """Newest first. Raises what the store raises."""
        entries = self._published.entries
        rows = []
        for manifest in self._found() if self._offers else ():
            summary = manifest.summary
            adapters = {row["concept"]: row["adapter"] for row in summary["concepts"]}
            if adapters.keys() <= entries.keys():
                shown = {key: summary[key] for key in ("format", "side", "precision", "base", "bytes")}
                rows.append(
                    Offered(
                        digest=manifest.digest,
                        made_at=manifest.created_at,
                        concepts=[*adapters],
                        older=[concept for concept, digest in adapters.items() if entries[concept].digest != digest],
                        download=f"/v1/packs/{manifest.digest}.zip",
                        **shown,
                    )
                )
        return sorted(rows, key=lambda row: (row.made_at, row.digest), reverse=True)

    def open(self, digest: str) -> Artifact:
        """An offered pack. Raises ProblemError when it is not one."""
        if all(row.digest != digest for row in self.offered()):
            raise ProblemError(404, f"no pack {digest} is offered")
        manifest = self._manifests[digest]
        assert manifest is not None
        return Artifact(self._published.store, manifest)

    def _found(self) -> list[Manifest]:
        store, keys = self._published.store, self._published.keys
        with self._looking:
            if time.monotonic() - self._looked_at > LOOK_SECONDS:
                listed = {key.split("/")[1] for key in store.list("packs/") if key.endswith(f"/{MANIFEST}")}
                known = {digest: found for digest, found in self._manifests.items() if digest in listed}
                for digest in sorted(listed - known.keys()):
                    try:
                        known[digest] = find(store, f"packs/{digest}", keys)
                    except UserError:  # whoever exported it is told by `farm verify`
                        known[digest] = None
                self._manifests, self._looked_at = known, time.monotonic()
            return [manifest for manifest in self._manifests.values() if manifest]


def pack_routes(packs: Packs) -> APIRouter:
    """`/v1/packs` and what is below it."""
    router = APIRouter(prefix="/v1/packs", tags=["packs"])
    downloads = threading.BoundedSemaphore(AT_ONCE)

    @router.get("", **openapi.browsing(PackRows))
    def list_packs(request: Request) -> Response:
        """The packs for phones, newest first."""
        return cached(request, PackRows(packs=packs.offered()))

    @router.get("/{digest}.zip", **openapi.PACK)
    def download(digest: Digest) -> StreamingResponse:
        """A pack as a ZIP file."""
        artifact = packs.open(digest)
        if not downloads.acquire(blocking=False):
            raise BusyError("other packs are being downloaded", 10)
        name = f"{artifact.manifest.summary['format']}-{digest[:12]}"

        def parts() -> Iterator[bytes]:
            try:
                yield from zipped(artifact, name)
            finally:
                downloads.release()

        sent = parts()
        first = next(sent)  # begun: so it ends, whatever becomes of the client; and a damaged pack is still an error
        headers = {"Content-Disposition": f'attachment; filename="{name}.zip"', "Cache-Control": "private, no-cache"}
        return StreamingResponse(chain([first], sent), media_type="application/zip", headers=headers)

    return router


def zipped(artifact: Artifact, folder: str) -> Iterator[bytes]:
    """An artifact's files as a ZIP file, below a folder in it; weights do not compress, so nothing is compressed."""
    out = _Taken()
    with ZipFile(out, "w", ZIP_STORED) as archive:
        for name in sorted(artifact.manifest.files):
            archive.writestr(ZipInfo(f"{folder}/{name}"), artifact.read(name))
            yield out.take()
    yield out.take()


class _Taken:
    """A file that cannot be sought in, and is taken away while it is written."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def flush(self) -> None:
        """There is nothing behind it."""

    close = flush

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken
