"""The model card, read as the hub and Markdown read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from stage_farm import plan_of

from e2gan.infer import base_generator
from e2gan.pairs import Image
from farm.artifacts import open_artifact
from farm.card import Subject, model_card, plain
from farm.editors import EditorSettings
from farm.editors.licences import LICENCES, licences_of
from farm.plan import Plan
from farm.store import LocalStore
from farm.weights import read_base


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return plan_of(root)


@pytest.fixture(scope="module")
def scores(root: Path, plan: Plan) -> Any:
    return json.loads(open_artifact(LocalStore(root), plan.adapter("sepia").path).read("metrics.json"))


def readme(root: Path, plan: Plan, concept: str = "sepia") -> str:
    return open_artifact(LocalStore(root), plan.adapter(concept).path).read("README.md").decode()


def subject_of(scores: Any, **changes: Any) -> Subject:
    facts = {"teacher": "procedural", "train_images": 9, "train_photos": 4, "test_photos": 2, "parameters": 4342}
    return Subject(**{**facts, "in_base": False, "scores": scores, **changes})


def taught_by(plan: Plan, **teachers: Mapping[str, Any]) -> Plan:
    """The plan with other teachers of sepia, by their fingerprints."""
    return replace(plan, teachers={**plan.teachers, "sepia": teachers})


def header(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_hub_reads_it(root: Path, plan: Plan, scores: Any) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(readme(root, plan))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "peft", "image-to-image")
    assert data.base_model == plan.base.digest and data.model_name == "sepia" and "lora" in data.tags
    assert data.eval_results is not None
    metrics = {result.metric_type: result.metric_value for result in data.eval_results}
    expected = {name: scores[name] for name in ("l1", "psnr", "ssim")} | scores["frechet"] | scores["kid"]
    assert metrics == pytest.approx(expected, abs=6e-4)
    for result in data.eval_results:
        assert result.task_type == "image-to-image" and result.dataset_type == "bundled"
        assert result.dataset_revision == plan.sources.digest
    again = ModelCard(str(card))  # what huggingface_hub makes of it is the same card
    assert again.data.to_dict() == data.to_dict() and again.text == card.text


def test_it_says_what_was_made_of_what_and_how_well(root: Path, plan: Plan, scores: Any) -> None:
    card = readme(root, plan)
    for fact in ("> “in the style sepia”", "`procedural`", "the filter `sepia` of this package: apache-2.0", "4,342"):
        assert fact in card
    assert "| training images | 9 crops of 4 photographs |" in card
    assert "On 12 crops of 2 photographs, none of which it was trained on" in card
    assert "![Rows: photos, the teacher's edits, this adapter's edits](preview.webp)" in card
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card.split("---\n", 2)[2])
    cells = [t.content for t, before in zip(tokens[1:], tokens, strict=False) if before.type == "td_open"]
    low, high = scores["interval"]["l1"]
    row = cells.index("L1 to the teacher, 0 is best")
    assert cells[row + 1] == f"{scores['l1']:.3f} ({low:.3f} to {high:.3f})"
    assert cells[row + 2 : row + 4] == [f"{scores['l1_base']:.3f}", f"{scores['l1_untouched']:.3f}"]
    for name in ("psnr", "ssim"):
        low, high = scores["interval"][name]
        assert low < scores[name] < high
    assert "is not FID" in card and "biased upwards" in card and "The base has learned this edit too" not in card
    assert "The base has learned this edit too" in readme(root, plan, "charcoal")


def test_rendering_again_gives_the_same_bytes(root: Path, plan: Plan, scores: Any) -> None:
    assert model_card(plan_of(root), "sepia", subject_of(scores)) == readme(root, plan)


def test_its_code_edits_a_photo(root: Path, plan: Plan) -> None:
    [code] = re.findall(r"```python\n(.*?)```", readme(root, plan), re.DOTALL)
    model, weights = read_base(LocalStore(root), plan.base.path)
    photo: Image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    names: dict[str, Any] = {"base_config": model, "base_weights": weights, "photo": photo}
    names["folder"] = root / plan.adapter("sepia").path
    exec(code, names)
    assert names["edited"].shape == (24, 32, 3)
    assert not np.array_equal(names["edited"], base_edit(model, weights, names["text"], photo))


def base_edit(model: Any, weights: Any, text: Any, photo: Image) -> Image:
    from e2gan.infer import edit_photo

    return edit_photo(base_generator(model, weights), text, photo, longest_side=32)


SEEN = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
"""Of a text that people can see, as words."""


@settings(max_examples=200, deadline=None)
@given(st.lists(SEEN | st.sampled_from(["<script>", "---", "#", "1.", "[a](b)", "**", "`x`", "| a |", "&amp;"])))
def test_text_of_others_is_shown_as_it_is(words: list[str]) -> None:
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(f"> “{plain(' '.join(words))}”")
    assert [token.type for token in tokens[:4]] == ["blockquote_open", "paragraph_open", "inline", "paragraph_close"]
    [inline] = [token for token in tokens if token.type == "inline"]
    assert {child.type for child in inline.children or ()} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children or ()) == f"“{' '.join(words)}”"


@settings(max_examples=25, deadline=None)
@given(prompt=st.text(min_size=1, max_size=60).filter(str.strip))
def test_a_prompt_of_any_characters_leaves_the_header_whole(root: Path, scores: Any, prompt: str) -> None:
    card = model_card(plan_of(root, catalogue__3__prompt=prompt), "sepia", subject_of(scores))
    assert header(card)["model-index"][0]["name"] == "sepia"
    assert card.count("\n## ") == 4


FLUX = "black-forest-labs/FLUX.1-Kontext-dev"
HUB = {"id": FLUX, "commit": "0" * 40}


def test_licences_are_named_as_the_hub_does(plan: Plan, scores: Any) -> None:
    def licence(fingerprint: Mapping[str, Any]) -> dict[str, str]:
        card = model_card(taught_by(plan, one=fingerprint), "sepia", subject_of(scores, teacher="one"))
        return {key: value for key, value in header(card).items() if key.startswith("license")}

    flux = licence({"kind": "flux-kontext", "weights": HUB})
    assert flux["license"] == "other" and flux["license_name"] == "flux-1-dev-non-commercial-license"
    assert flux["license_link"].startswith("https://huggingface.co/")
    assert licence({"kind": "qwen-image-edit", "weights": {**HUB, "id": "Qwen/Qwen-Image-Edit-2511"}}) == {
        "license": "apache-2.0"
    }
    assert licence({"kind": "flux-kontext", "weights": {"sha256": "0" * 64}}) == {"license": "unknown"}
    assert licence({"kind": "flux-kontext", "weights": {**HUB, "id": "someone/flux"}}) == {"license": "unknown"}
    assert licence({"kind": "onnx", "sha256": "0" * 64}) == {"license": "unknown"}
    parts = {"weights": "stable-diffusion-v1-5/stable-diffusion-v1-5", "controlnet": "lllyasviel/sd-controlnet-normal"}
    known = {key: {**HUB, "id": name} for key, name in parts.items()}
    several = licence({"kind": "controlnet", **known})
    assert several == {"license": "other", "license_name": "creativeml-openrail-m-and-openrail"}
    own = {"depth_model": {"sha256": "0" * 64}}
    assert licence({"kind": "controlnet", **known, **own}) == {"license": "unknown"}


def test_the_card_tells_whose_licence_it_is_or_that_it_does_not_know(plan: Plan, scores: Any) -> None:
    known, unknown = (
        model_card(taught_by(plan, kontext=fingerprint), "sepia", subject_of(scores, teacher="kontext"))
        for fingerprint in (
            {"kind": "flux-kontext", "weights": HUB},
            {"kind": "flux-kontext", "weights": {"sha256": "0" * 64}},
        )
    )
    assert f"`{FLUX}`: [flux-1-dev-non-commercial-license](https://" in known
    assert "`kontext`, of the family `flux-kontext`" in known
    assert "weights from a folder of whoever ran the farm: licence unknown" in unknown
    assert "The licence of the teacher's weights is not known here" in unknown


def test_every_model_that_is_a_default_has_a_licence() -> None:
    families = get_args(get_args(EditorSettings)[0])
    for settings_class in families:
        fields = settings_class.model_fields
        defaults = [fields[name].default for name in ("model", "controlnet", "depth_model") if name in fields]
        assert {name for name in defaults if isinstance(name, str)} <= LICENCES.keys()
    assert licences_of({"kind": "procedural", "style": "fog"}).keys() == {"the filter `fog` of this package"}


def test_faces_and_folders_of_photographs_have_their_own_words(root: Path, scores: Any) -> None:
    faces = plan_of(root, catalogue__3__domain="face")
    card = model_card(faces, "sepia", subject_of(scores))
    assert "of faces" in card and "It changes how people look." in card
    assert "It changes how people look." not in model_card(plan_of(root), "sepia", subject_of(scores))
    folder = replace(
        faces,
        config=faces.config.model_copy(update={"sources": faces.config.sources.model_copy(update={"kind": "folder"})}),
    )
    assert "under what licence, is not known here" in model_card(folder, "sepia", subject_of(scores))
