"""One YAML file describes one farm: typed, unknown keys refused, every mistake one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from e2gan.config import AdapterConfig, GeneratorConfig, TrainConfig
from farm.catalogue import Concept, Slug, base_concepts, check_concepts, find_concept, load_catalogue, near
from farm.editors import KINDS, EditorSettings
from farm.errors import UserError
from farm.quality import QualityConfig
from farm.sources import SourcesConfig


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
    """

    concepts: tuple[Slug, ...] = ()
    representatives: int | None = Field(default=None, ge=1)
    train: TrainConfig = TrainConfig()
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> BaseConfig:
        if bool(self.concepts) == (self.representatives is not None):
            raise ValueError("give either concepts, the ids the base learns, or representatives, how many to choose")
        return self


class RanksConfig(_Section):
    """The doubling rank search (Algorithm 1) on sampled concepts.

    train: one round's training. tolerance, patience: when the score counts as saturated (see `e2gan.ranks.finished`).
    """

    concepts: tuple[Slug, ...] = Field(min_length=1)
    train: TrainConfig = TrainConfig(epochs=10)
    tolerance: float = Field(default=0.01, ge=0)
    patience: int = Field(default=1, ge=1)


class AdaptersConfig(_Section):
    """One adapter a concept: its training, LoRA's settings, and when it is good enough to publish.

    max_l1_ratio: an adapter whose L1 to the teacher on the test split is more than this share of the untouched photo's
        is kept but not published. max_attempts: tries before a concept is given up. lease_seconds: how long a worker
        that fell silent keeps its concept.
    """

    train: TrainConfig = TrainConfig()
    lora: AdapterConfig = AdapterConfig()
    max_l1_ratio: float = Field(default=0.95, gt=0)
    max_attempts: int = Field(default=2, ge=1)
    lease_seconds: float = Field(default=300, gt=0)

    def accept(self, scores: Mapping[str, Any]) -> bool:
        """Whether an adapter with these test scores is good enough to publish."""
        return bool(scores["l1"] <= self.max_l1_ratio * scores["l1_untouched"])


class EvaluationConfig(_Section):
    """How adapters are judged. inception: file or folder of clean-fid's Inception weights; without it the Fréchet
    distance is on untrained features and is called `fd_untrained`."""

    inception: str | None = None


class Resources(_Section):
    """What one Ray worker of a stage takes. gpus: 0, a share such as 0.5 or 0.25 (1/N), or a whole number."""

    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _share(self) -> Resources:
        share = self.gpus % 1
        if share and (self.gpus > 1 or abs(1 / share - round(1 / share)) > 1e-6):
            raise ValueError(f"gpus must be a whole number or 1/N, not {self.gpus:g}")
        return self


class ClusterConfig(_Section):
    """Where the work runs.

    address: a running Ray cluster (`auto`, `ray://…`); without it the one RAY_ADDRESS names, else one started here.
    cpus: CPUs of a cluster started here; all of this machine's when left out.
    """

    address: str | None = None
    cpus: int | None = Field(default=None, ge=1)
    edit: Resources = Resources()
    base: Resources = Resources()
    ranks: Resources = Resources()
    adapters: Resources = Resources()


class ServeConfig(_Section):
    """The endpoint. max_side: longest side of an edited photo in pixels. cache_mb: memory for merged adapters."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    max_side: int = Field(default=512, ge=64, le=4096)
    max_body_mb: float = Field(default=10, gt=0)
    cache_mb: int = Field(default=512, ge=1)


class FarmConfig(_Section):
    """A farm. store: folder or file:// address everything it makes lives in. seed: all others derive from it.

    teachers: by name; a concept that names none has them all compared, and the best one edits (see `Concept`).
    """

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


class _Excerpt(_Section):
    """`catalogue: {from: ffhq, only: [old-person, zombie]}`: some concepts of a longer list."""

    source: str = Field(alias="from")
    only: tuple[Slug, ...] = Field(min_length=1)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> FarmConfig:
    """Read a farm's YAML, apply `key=value` overrides (keys dotted, values YAML) and check everything.

    `catalogue` may be a list of concepts, the path of a YAML file that holds one, `ffhq` or `scenery` (the packaged
    ones), or `{from: <one of these>, only: [ids]}`. Without `base.concepts` and `base.representatives`
    the base learns what the catalogue marks for it.

    Raises:
        UserError: the file cannot be read, is not YAML, or a key or value is wrong.
    """
    path = Path(path)
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: a farm's configuration is a mapping of keys, see configs/demo.yaml.")
    for override in overrides:
        _override(document, override)
    try:
        _fill_in(path, document)
        config = FarmConfig.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from error
    _check_concepts(path, config)
    return config


def _fill_in(path: Path, document: dict[str, Any]) -> None:
    """Read the catalogue where the document only names it, and take the base's concepts from it where it lists none."""
    named = document.get("catalogue")
    if isinstance(named, str):
        document["catalogue"] = load_catalogue(named)
    elif isinstance(named, dict):
        excerpt = _Excerpt.model_validate(named)
        listed = {concept.get("id"): concept for concept in load_catalogue(excerpt.source)}
        for concept_id in excerpt.only:
            if concept_id not in listed:
                hint = near(concept_id, [str(known) for known in listed])
                raise UserError(f"{path}: catalogue.only: {excerpt.source} has no concept {concept_id!r}; {hint}")
        document["catalogue"] = [listed[concept_id] for concept_id in excerpt.only]
    base = document.get("base")
    if isinstance(base, dict) and not {"concepts", "representatives"} & base.keys() and named is not None:
        listed_concepts = document["catalogue"] if isinstance(document["catalogue"], list) else []
        marked = base_concepts(check_concepts([entry for entry in listed_concepts if isinstance(entry, dict)])[0])
        if marked:
            base["concepts"] = marked


def _check_concepts(path: Path, config: FarmConfig) -> None:
    ids = [concept.id for concept in config.catalogue]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise UserError(f"{path}: catalogue: the id {twice[0]!r} occurs twice; ids must be unique.")
    for key, names in (("base.concepts", config.base.concepts), ("ranks.concepts", config.ranks.concepts)):
        for name in names:
            find_concept(config.catalogue, name, key=f"{path}: {key}")
    for concept in config.catalogue:
        for name in concept.teachers or ():
            if name not in config.teachers:
                hint = near(name, config.teachers)
                raise UserError(f"{path}: catalogue: {concept.id}: teachers: there is no teacher {name!r}; {hint}")
        if not config.candidates(concept.id):
            raise UserError(
                f"{path}: catalogue: {concept.id} has no teacher; give it an editor, or the farm some `teachers`."
            )
    if config.base.representatives is not None and config.base.representatives > len(config.eligible):
        raise UserError(
            f"{path}: base.representatives: {config.base.representatives} concepts cannot be chosen among the "
            f"{len(config.eligible)} that are neither kept for evaluation nor in ranks.concepts."
        )
    both = sorted(set(config.base.concepts) & set(config.ranks.concepts))
    if both:
        raise UserError(f"{path}: ranks.concepts: {both[0]!r} is also in base.concepts; search ranks on others.")


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file such as configs/demo.yaml."
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: is not YAML{place}: {problem}.") from error


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write key=value, for example --set adapters.train.epochs=5.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {override}: {text!r} is not a YAML value.") from error
    *parents, last = key.split(".")
    here: Any = document
    for name in parents:
        here = (
            here[int(name)]
            if isinstance(here, list) and name.isdigit() and int(name) < len(here)
            else (here.setdefault(name, {}) if isinstance(here, dict) else None)
        )
    if isinstance(here, dict):
        here[last] = value
    elif isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    else:
        raise UserError(f"--set {override}: the configuration has no place {key}.")


def _sentence(error: ValidationError) -> str:
    """The first mistake as one sentence with its dotted key."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in KINDS)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(first["loc"][-1]), _keys_at(first["loc"][:-1]), n=1)
        return f"unknown key {place}; " + (
            f"did you mean {close[0]}?" if close else "remove it, see configs/demo.yaml."
        )
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return f"the key {place} is missing."
    if first["type"] == "union_tag_not_found":
        return f"the key {place}.kind is missing."
    if first["type"] == "union_tag_invalid":
        kinds = first["ctx"]["expected_tags"].replace(", ", " or ")
        return f"{place}.kind: should be {kinds}, not {first['ctx']['tag']!r}."
    if first["type"] == "string_pattern_mismatch":
        return f"{place}: an id is lower-case words and digits joined by single hyphens, not {first['input']!r}."
    given = "" if isinstance(first["input"], dict | list) else f", not {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    return f"{place}: {message}{given}."


def _keys_at(place: Sequence[str | int]) -> list[str]:
    """The keys there can be at a place, which is as pydantic gives it: with indices and the tags of unions."""
    schema = FarmConfig.model_json_schema()
    here = schema
    for part in place:
        if "anyOf" in here:  # of an optional one, what it may be besides None
            here = here["anyOf"][0]
        if isinstance(part, int):
            here = here["items"]
        elif "discriminator" in here:
            here = {"$ref": here["discriminator"]["mapping"][part]}
        elif "additionalProperties" in here and "properties" not in here:  # a mapping with keys of the user's
            here = here["additionalProperties"]
        else:
            here = here["properties"][part]
        if "$ref" in here:
            here = schema["$defs"][here["$ref"].rpartition("/")[2]]
    return list(here["properties"])
