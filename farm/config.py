"""What describes a farm, typed: unknown keys are refused. `farm.config_file` reads it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from e2gan.config import AdapterConfig, GeneratorConfig, TrainConfig
from farm.catalogue import Concept, Slug, find_concept
from farm.cost.prices import CostConfig
from farm.editors import EditorSettings
from farm.errors import UserError
from farm.quality import QualityConfig
from farm.serve.config import ServeConfig
from farm.sources import SourcesConfig

if TYPE_CHECKING:
    from typing import Self

CONFIG_VERSION: Literal[1] = 1
"""Of a configuration's keys: a file of a newer version is refused, docs/upgrading.md says what changed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SelectionConfig(_Section):
    """Which training images are kept (E2GAN section 4.2.3).

    clusters: how many: as many clusters there are, with one image of each; all images when left out.
    method: `cluster` by similarity, or `random`, the paper's comparison, as many images as there would be clusters.
    embedding: what clusters are of: `thumbnail` needs no weights; `clip` is the CLIP image encoder at `path` (a folder
        or a hub id); `onnx` is the model file at `path`, which takes what FaceNet takes.
    """

    clusters: int | None = Field(default=None, ge=1)
    method: Literal["cluster", "random"] = "cluster"
    embedding: Literal["thumbnail", "clip", "onnx"] = "thumbnail"
    path: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> SelectionConfig:
        if self.method == "random" and self.clusters is None:
            raise ValueError("clusters, how many images to keep, is needed with method: random")
        if self.embedding != "thumbnail" and not self.path:
            raise ValueError(f"path is needed with embedding: {self.embedding}")
        return self


class ComparisonConfig(_Section):
    """Choosing a concept's teacher where it has several. probes: training images that each of them edits."""

    probes: int = Field(default=8, ge=2, le=64)


class TextConfig(_Section):
    """The prompt's encoder: `hashing` needs no weights; `clip` is CLIP ViT-L/14 at `path` (a folder or a hub id)."""

    encoder: Literal["hashing", "clip"] = "hashing"
    path: str | None = None


class BaseConfig(_Section):
    """The base: the concepts it learns, its training, and how many Ray Train workers share it.

    representatives: instead of `concepts`, how many to choose by clustering what their edits look like (E2GAN section
    4.2.1), among those that are neither kept back for evaluation nor in `ranks.concepts`.
    min_workers: the fewest that may begin, or go on when nodes are lost; all of `workers` when left out.
    """

    concepts: tuple[Slug, ...] = ()
    representatives: int | None = Field(default=None, ge=1)
    train: TrainConfig = TrainConfig()
    workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> BaseConfig:
        if bool(self.concepts) == (self.representatives is not None):
            raise ValueError("give either concepts, the ids the base learns, or representatives, how many to choose")
        return self

    @model_validator(mode="after")
    def _enough_workers(self) -> BaseConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must be at most workers ({self.workers})")
        return self


class RanksConfig(_Section):
    """The doubling rank search (Algorithm 1) on sampled concepts.

    train: one round's training. tolerance, patience: when the score counts as saturated (see `e2gan.ranks.finished`).
    """

    concepts: tuple[Slug, ...] = Field(min_length=1)
    train: TrainConfig = TrainConfig(epochs=10)
    tolerance: float = Field(default=0.01, ge=0)
    patience: int = Field(default=1, ge=1)


class GateConfig(_Section):
    """What an adapter must show on the test split before it is published, besides `adapters.max_l1_ratio`.

    enabled: with false it is asked for none of these. min_gain_over_base: by how much its L1 to the teacher is to be
        smaller than that of the base without adapter, as a share of the latter; what an interval of the difference
        leaves open is granted, and where the base has learned the concept itself nothing is asked but to be no worse.
        max_distance_ratio: of its Fréchet distance to the untouched photos'; few test images make that unsure, and it
        is not asked when left out. min_variety: how much its pictures differ from each other, as a share of what the
        teacher's do. min_contrast: the same of how much a picture differs from one colour. max_latency_ms: of one edit
        of `sources.size`, on the CPU of the worker that trains it; not asked when left out.
    """

    enabled: bool = True
    min_gain_over_base: float = Field(default=0.02, ge=-1, lt=1)
    max_distance_ratio: float | None = Field(default=None, gt=0)
    min_variety: float = Field(default=0.3, ge=0, le=1)
    min_contrast: float = Field(default=0.3, ge=0, le=1)
    max_latency_ms: float | None = Field(default=None, gt=0)


class AdaptersConfig(_Section):
    """One adapter a concept: its training, LoRA's settings, and when it is good enough to publish.

    max_l1_ratio: an adapter whose L1 to the teacher on the test split is more than this share of the untouched photo's
        is kept but not published; `gate` holds the other limits. max_attempts: tries before a concept is given up.
        lease_seconds: how long a worker that fell silent keeps its concept.
    """

    train: TrainConfig = TrainConfig()
    lora: AdapterConfig = AdapterConfig()
    max_l1_ratio: float = Field(default=0.95, gt=0)
    gate: GateConfig = GateConfig()
    max_attempts: int = Field(default=2, ge=1)
    lease_seconds: float = Field(default=300, gt=0)


class EvaluationConfig(_Section):
    """How adapters are judged. inception: file or folder of clean-fid's Inception weights; without it the Fréchet
    distance is on untrained features and is called `fd_untrained`."""

    inception: str | None = None


_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"


class Resources(_Section):
    """What one Ray worker of a stage takes, where it may run, and how many there may be.

    gpus: 0, a share such as 0.5 or 0.25 (1/N), or a whole number. memory_gb: what Ray sets aside for it, in 10^9 bytes.
    labels: what the labels of its node must be: a value, `!value`, `in(one,other)` or `!in(one,other)`.
    workers: at most this many at once; as many as the nodes take when left out.
    """

    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    memory_gb: float | None = Field(default=None, gt=0)
    labels: dict[str, str] = Field(default_factory=dict)
    workers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _share(self) -> Resources:
        share = self.gpus % 1
        if share and (self.gpus > 1 or abs(1 / share - round(1 / share)) > 1e-6):
            raise ValueError(f"gpus must be a whole number or 1/N, not {self.gpus:g}")
        return self

    @model_validator(mode="after")
    def _selectors(self) -> Resources:
        for name, wanted in self.labels.items():
            if not re.fullmatch(rf"([a-zA-Z0-9.-]+/)?{_LABEL}", name):
                raise ValueError(f"labels: a label cannot be called {name!r}; use letters, digits and -_.")
            if not re.fullmatch(
                rf"!?({_LABEL}|in\({_LABEL}(,{_LABEL})*\))", wanted
            ):  # a blank would be part of a value to Ray
                raise ValueError(
                    f"labels.{name} must be value, !value, in(one,other) or !in(one,other), not {wanted!r}"
                )
        return self


class ClusterConfig(_Section):
    """Where the work runs.

    address: a running Ray cluster (`auto`, `ray://…`); without it the one RAY_ADDRESS names, else one started here.
    cpus: CPUs of a cluster started here; all of this machine's when left out.
    autoscaling: the file of Ray's cluster launcher, whose node types may come when work waits for them; on a head that
        `ray up` made, `~/ray_bootstrap_config.yaml`. Without it the farm counts on the nodes that are there.
    grace_seconds: how long what is under way may take to end, or to leave a checkpoint, after a SIGTERM.
    store_patience_seconds: how long a run and its workers wait for a store that stopped answering; 0 to fail at once.
    """

    address: str | None = None
    cpus: int | None = Field(default=None, ge=1)
    autoscaling: str | None = None
    grace_seconds: float = Field(default=20, ge=0)
    store_patience_seconds: float = Field(default=600, ge=0)
    edit: Resources = Resources()
    base: Resources = Resources()
    ranks: Resources = Resources()
    adapters: Resources = Resources()

    @model_validator(mode="after")
    def _one_number(self) -> ClusterConfig:
        if self.base.workers is not None:
            raise ValueError("base.workers is no key here; how many train the base is the farm's own key base.workers")
        return self


class SigningConfig(_Section):
    """Signatures of what is published (docs/storage.md). `farm keys new` makes a key.

    private_key: the file of the key that publishing signs with; only where adapters are published. public_keys: whose
        signatures count: files, or keys as `farm keys show` prints them. Where there are any, an adapter, a base or a
        record that none of them signed is neither served nor edited with, rolled back to or pushed to the hub.
    """

    private_key: str | None = None
    public_keys: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _counts(self) -> SigningConfig:
        if self.private_key is not None and not self.public_keys:
            raise ValueError("public_keys is needed with private_key, or nobody would look at what it signs")
        return self


class TrackingConfig(_Section):
    """Where else a run's curves go (docs/watching.md). tensorboard: event files of the base and of each adapter under
    `runs/<id>/tensorboard/`. mlflow: address of an MLflow tracking server, which is told of each training that is
    done; needs the extra `mlflow`."""

    tensorboard: bool = True
    mlflow: str | None = None

    @field_validator("mlflow")
    @classmethod
    def _without_password(cls, address: str | None) -> str | None:
        if address and urlsplit(address).password:
            raise ValueError("takes no password; export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead")
        return address


@dataclass(frozen=True)
class _Given:
    """Where a configuration is from, which makes it no other one."""

    options: str = field(default="--config FARM.yaml", compare=False)


class FarmConfig(_Section):
    """A farm. version: of the keys' meaning. store: folder or file:// address everything it makes lives in.
    seed: all others derive from it.

    teachers: by name; a concept that names none has them all compared, and the best one edits (see `Concept`).
    """

    version: Literal[1] = CONFIG_VERSION
    name: Slug
    store: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    sources: SourcesConfig = SourcesConfig()
    selection: SelectionConfig = SelectionConfig()
    teachers: dict[Slug, EditorSettings] = Field(default_factory=dict)
    catalogue: tuple[Concept, ...] = Field(min_length=1)
    comparison: ComparisonConfig = ComparisonConfig()
    quality: QualityConfig = QualityConfig()
    text: TextConfig = TextConfig()
    model: GeneratorConfig = GeneratorConfig()
    base: BaseConfig
    ranks: RanksConfig
    adapters: AdaptersConfig = AdaptersConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    serve: ServeConfig = ServeConfig()
    signing: SigningConfig = SigningConfig()
    tracking: TrackingConfig = TrackingConfig()
    cost: CostConfig = CostConfig()

    _given: _Given = PrivateAttr(default=_Given())

    @property
    def options(self) -> str:
        """What a command is given to find this farm again, as a shell takes it."""
        return self._given.options

    def given_by(self, options: Sequence[str]) -> Self:
        """The same farm, which says so from now on."""
        self._given = _Given(shlex.join(options))
        return self

    def concept(self, concept_id: str) -> Concept:
        """The concept of that id; UserError when there is none."""
        return find_concept(self.catalogue, concept_id, key="concept")

    @property
    def eligible(self) -> list[str]:
        """The concepts that `base.representatives` may choose from."""
        return [c.id for c in self.catalogue if not c.reserved and c.id not in self.ranks.concepts]

    def candidates(self, concept_id: str) -> dict[str, EditorSettings]:
        """The teachers a concept may have, by name: its own one alone, those it names, or all of the farm's."""
        concept = self.concept(concept_id)
        if concept.editor is not None:
            return {concept.editor.kind: concept.editor}
        return {name: self.teachers[name] for name in concept.teachers or self.teachers}

    def of_teacher(self, error: UserError, concept_id: str, teacher: str) -> UserError:
        """An editor's complaint about its settings, with the keys they have in this configuration."""
        if self.concept(concept_id).editor is not None:
            return UserError(f"catalogue: {concept_id}: {error}")
        return UserError(str(error).replace("editor.", f"teachers.{teacher}."))
