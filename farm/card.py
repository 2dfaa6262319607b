"""An adapter's model card: `README.md` as the Hugging Face Hub reads it.

The metadata header follows huggingface_hub's `ModelCardData` and model index. The card is a file of the artifact, so
it says nothing that another run of the same plan would not say: no times, no machine, no names that are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from e2gan.config import TrainConfig
from farm.editors.licences import Licence, licences_of
from farm.plan import Plan

if TYPE_CHECKING:
    from farm.stages.assess import AdapterScores

PREVIEW = "preview.webp"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The adapter a card is about.

    teacher: its name among the concept's candidates. train_images, train_photos: the images it was trained on and the
    photographs they are crops of; test_photos: those of the `scores["n"]` test images. in_base: whether the base has
    learned the concept itself. parameters: of the adapter.
    """

    teacher: str
    train_images: int
    train_photos: int
    test_photos: int
    in_base: bool
    parameters: int
    scores: AdapterScores


def model_card(plan: Plan, concept_id: str, subject: Subject) -> str:
    """The card, in Markdown with a YAML header."""
    fingerprint = plan.teachers[concept_id][subject.teacher]
    licences = licences_of(fingerprint)
    header = yaml.safe_dump(
        _metadata(plan, concept_id, subject, licences), sort_keys=False, allow_unicode=True, width=120
    )
    side = plan.config.sources.size
    files = '("adapter_config.json", "adapter_model.safetensors")'
    return f"""---
{header}---
# {concept_id}

> “{plain(plan.config.concept(concept_id).prompt)}”

A small network's version of this edit: one pass over a photo, no diffusion. The adapter is a LoRA of
{subject.parameters:,} parameters in peft's format, for the E2GAN base `{plan.base.digest}`, which is not in this folder
and without which it does nothing.

![Rows: photos, the teacher's edits, this adapter's edits]({PREVIEW})

Rows: photos of the test split, the teacher's edits of them, this adapter's edits.

## Use

`e2gan.lora_peft.load` reads it; peft alone does not know LoRA on transposed convolutions. `text.safetensors` holds the
prompt as the network reads it ({plan.config.text.encoder} encoder).

```python
from e2gan.infer import adapted_generator, edit_photo
from e2gan.lora_peft import load
from safetensors.torch import load_file

files = {{name: (folder / name).read_bytes() for name in {files}}}
adapter = load(files, base="{plan.base.digest}")
generator = adapted_generator(base_config, base_weights, adapter)  # of that base
text = load_file(folder / "text.safetensors")["text"]
edited = edit_photo(generator, text, photo, longest_side={side})
```

## Training

| | |
|---|---|
| teacher | {_teacher(subject.teacher, fingerprint["kind"])} |
| made of | {"; ".join(f"{what}: {_spelled(licence)}" for what, licence in licences.items())} |
| training images | {_images(subject.train_images, subject.train_photos)} |
| photographs | {_sources(plan)} |
| size | {side} × {side} pixels |
| training | {_training(plan.config.adapters.train)} |

## Results

On {_images(subject.scores["n"], subject.test_photos)}, none of which it was trained on; values in -1..1.

{_results(subject.scores)}
In brackets: 95 % bootstrap intervals over the test images. Crops of one photograph are alike, so that for other
photographs these intervals are too narrow.{_notes(subject)}

## Intended use and limits

{_limits(plan, concept_id, licences)}
"""


def plain(text: str) -> str:
    """Text of others as Markdown shows it as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&$])", r"\\\1", " ".join(text.split()))


def _metadata(plan: Plan, concept_id: str, subject: Subject, licences: Mapping[str, Licence]) -> dict[str, Any]:
    scores = subject.scores
    metrics = [
        {"type": "l1", "value": round(scores["l1"], 4), "name": "L1 to the teacher"},
        {"type": "psnr", "value": round(scores["psnr"], 3), "name": "PSNR to the teacher, dB"},
        {"type": "ssim", "value": round(scores["ssim"], 4), "name": "SSIM to the teacher"},
    ]
    for name, value in {**scores["frechet"], **scores["kid"]}.items():
        metrics.append({"type": name, "value": round(value, 4), "name": f"{name} to the teacher"})
    kind = plan.config.sources.kind
    data = {"type": kind, "name": f"test split ({kind} photographs)", "revision": plan.sources.digest}
    task = {"type": "image-to-image", "name": "Image-to-Image"}
    return {
        **_licence(licences),
        "library_name": "peft",
        "base_model": plan.base.digest,
        "pipeline_tag": "image-to-image",
        "tags": ["e2gan", "lora", "image-to-image"],
        "model-index": [{"name": concept_id, "results": [{"task": task, "dataset": data, "metrics": metrics}]}],
    }


def _licence(licences: Mapping[str, Licence]) -> dict[str, str]:
    """The header's keys: the teacher's licence; `other` where its parts have several, `unknown` where one is."""
    kinds = list(dict.fromkeys(licences.values()))
    ids = [kind.id for kind in kinds]
    if "unknown" in ids:
        return {"license": "unknown"}
    if len(kinds) > 1:
        return {"license": "other", "license_name": "-and-".join(kind.name or kind.id for kind in kinds)}
    extra = {"license_name": kinds[0].name, "license_link": kinds[0].link}
    return {"license": ids[0], **{key: value for key, value in extra.items() if value}}


def _teacher(name: str, kind: str) -> str:
    return f"`{name}`" if name == kind else f"`{name}`, of the family `{kind}`"


def _spelled(licence: Licence) -> str:
    if licence.link:
        return f"[{licence.name}]({licence.link})"
    return "licence unknown" if licence.id == "unknown" else licence.id


def _images(images: int, photos: int) -> str:
    return f"{images:,} crops of {photos:,} photograph{'s' * (photos != 1)}"


def _sources(plan: Plan) -> str:
    if plan.config.sources.kind == "bundled":
        return "those that scikit-learn and scikit-image come with; these packages tell where each is from"
    return "a folder of whoever ran the farm; whose they are, and under what licence, is not known here"


def _training(train: TrainConfig) -> str:
    losses = [f"{train.l1_weight:g} L1"]
    if train.gradient_weight:
        losses.append(f"{train.gradient_weight:g} gradient L1")
    if train.adversarial_weight:
        losses.append(f"{train.adversarial_weight:g} {train.adversarial_loss}")
    return f"{train.epochs:g} epochs, batch {train.batch_size}, rate {train.learning_rate:g}, {' + '.join(losses)}"


def _results(scores: AdapterScores) -> str:
    rows = ["| | adapter | base without it | photo left as it is |", "|---|---|---|---|"]

    def row(what: str, name: str, digits: int, *others: float) -> None:
        low, high = scores["interval"][name]
        shown = [f"{scores[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"]  # type: ignore[literal-required]
        shown += [f"{value:.{digits}f}" for value in others] or ["", ""]
        rows.append(f"| {what} | {' | '.join(shown)} |")

    row("L1 to the teacher, 0 is best", "l1", 3, scores["l1_base"], scores["l1_untouched"])
    row("PSNR to the teacher, dB", "psnr", 2)
    row("SSIM to the teacher, 1 is best", "ssim", 3)
    for name, value in scores["frechet"].items():
        others = f"{scores['frechet_base'][name]:.3f} | {scores['frechet_untouched'][name]:.3f}"
        rows.append(f"| {name}, 0 is best | {value:.3f} | {others} |")
    for name, value in scores["kid"].items():
        rows.append(f"| {name} | {value:.4f} | | |")
    return "\n".join(rows) + "\n"


def _notes(subject: Subject) -> str:
    notes = []
    if "fd_untrained" in subject.scores["frechet"]:
        notes.append("`fd_untrained` is taken on an untrained network: it ranks adapters of one farm and is not FID.")
    if warning := subject.scores["warning"]:
        notes.append(f"{warning[0].upper()}{warning[1:]}.")
    if subject.in_base:
        notes.append("The base has learned this edit too, so there was little to gain on it.")
    return "".join(f" {note}" for note in notes)


def _limits(plan: Plan, concept_id: str, licences: Mapping[str, Licence]) -> str:
    face = plan.config.concept(concept_id).domain == "face"
    side = plan.config.sources.size
    lines = [
        f"Made to edit photos like those it was trained on, {'of faces' if face else 'of scenes and things'}, on small "
        "devices or in bulk.",
        f"Trained and measured on {side} × {side} pixels. Other sizes work, and nobody has measured how well.",
        "It imitates its teacher, mistakes and leanings included. The scores say how near it comes to the teacher's "
        "edits, not how good those are or how well they follow the prompt.",
        "It knows one edit. The prompt is part of the adapter; another prompt is another adapter.",
        "Fine detail comes out softer than the teacher's, and what the teacher invents anew for each photo it cannot.",
    ]
    if face:
        lines.append(
            "It changes how people look. Do not use it on pictures of people who would object, nor to deceive: say "
            "that a picture was edited. It may work less well on people whom the training photos show seldom."
        )
    if any(licence.id == "unknown" for licence in licences.values()):
        lines.append("The licence of the teacher's weights is not known here: ask whoever ran the farm first.")
    else:
        lines.append("The licence named above is the teacher's; whether it binds an adapter is for you to find out.")
    return "\n".join(f"- {line}" for line in lines)
