"""The `serve` section of a farm's configuration, which `serve.yaml` has too."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.catalogue import Slug


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiKey(_Section):
    """Who may use the endpoint. sha256: of the key, in hex; `farm serve-key new` makes both. admin: whether it opens
    /v1/admin too. per_minute: how many edits, kept by each replica that speaks HTTP; no limit when left out."""

    name: Slug
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    admin: bool = False
    per_minute: int | None = Field(default=None, ge=1)


class ServiceConfig(_Section):
    """The endpoint, wherever it listens.

    max_side: longest side that photos are edited at, in pixels; answers have the size that is asked for.
    max_body_mb, max_megapixels: largest upload, in 10^6 bytes and pixels. decode_seconds: how long decoding may take.
    cache_mb: memory for adapters in each editing replica, in 10^6 bytes, beside the base.
    pinned: concepts that stay in it whatever is asked for. popular: concepts that are loaded first at the start.
    compiled: sizes, such as 512x384 (width first), that have a compiled graph; on a CPU each takes up to a minute of
        the start, and edits of other sizes take about twice as long. At most 8, together for all bases that are served.
    cpus, gpus: of each editing replica; with a GPU it edits in mixed batches of up to `batch` photos.
    replicas, max_replicas: of the editing replicas; Ray Serve runs as many as the load asks for, `replicas` at least,
        and no more than that when the other is left out.
    max_waiting: photos that may wait for each of them; others are refused at once.
    watch_seconds: how often the registry is looked at.
    packs: whether the store's packs for phones can be downloaded.
    keys: who may use it; everybody who can reach it when empty. origins: web pages of other sites that may use it.
    """

    max_side: int = Field(default=512, ge=64, le=4096)
    max_body_mb: float = Field(default=10, gt=0)
    max_megapixels: float = Field(default=50, gt=0, le=200)
    decode_seconds: float = Field(default=10, gt=0)
    cache_mb: int = Field(default=512, ge=1)
    pinned: tuple[Slug, ...] = ()
    popular: tuple[Slug, ...] = ()
    compiled: tuple[Annotated[str, Field(pattern="^[0-9]{2,4}x[0-9]{2,4}$")], ...] = Field(default=(), max_length=8)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    batch: int = Field(default=16, ge=1)
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    max_waiting: int = Field(default=4, ge=1)
    watch_seconds: float = Field(default=2, gt=0, le=4)
    packs: bool = True
    keys: tuple[ApiKey, ...] = ()
    origins: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> ServiceConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least replicas ({self.replicas})")
        for size in self.compiled:
            if any(int(side) % 8 or int(side) < 16 for side in size.split("x")):
                raise ValueError(f"compiled: the sides of {size} must be multiples of 8, and at least 16")
        return self


class ServeConfig(ServiceConfig):
    """The endpoint that `farm serve` starts."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
