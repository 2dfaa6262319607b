from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2gan.pairs import Image
from farm.editors.base import Prompt
from farm.errors import UserError
from farm.quality import ClipJudge, measure

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BEFORE, AFTER = "a photo of a person", "a photo of a zombie"


def picture(seed: int, height: int = 40, width: int = 32) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_clip(folder: Path, *, vocab_size: int = 514) -> Path:
    """A whole CLIP model of two small towers, random weights, and its tokenizer."""
    from tiny_diffusers import clip_tokenizer

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"projection_dim": 12}
    text = {**tower, "vocab_size": vocab_size, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipJudge:
    return ClipJudge(folder)


def embed(folder: Path, images: list[Image], texts: list[str]) -> tuple[Any, Any]:
    """Unit embeddings by transformers' own model, processor and tokenizer: float64 `[n, 12]` each."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = dict(processor(images, return_tensors="pt")) | dict(
            tokenizer(texts, padding=True, return_tensors="pt")
        )
        found = model(**inputs)
    both = (np.asarray(one.double()) for one in (found.image_embeds, found.text_embeds))
    image, text = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in both)
    return image, text


def test_both_measures_against_transformers_own_pipeline(clip: ClipJudge, folder: Path) -> None:
    source, edit = picture(0), picture(1)
    image, text = embed(folder, [source, edit], [BEFORE, AFTER])
    changes = image[1] - image[0], text[1] - text[0]
    cosine = changes[0] @ changes[1] / np.linalg.norm(changes[0]) / np.linalg.norm(changes[1])
    assert clip.direction(source, edit, BEFORE, AFTER) == pytest.approx(cosine, abs=2e-3)
    assert clip.similarity(source, edit) == pytest.approx(image[0] @ image[1], abs=1e-4)


def test_the_opposite_direction_is_the_opposite(clip: ClipJudge) -> None:
    source, edit = picture(0), picture(1)
    forth = clip.direction(source, edit, BEFORE, AFTER)
    assert abs(forth) > 0.01
    assert clip.direction(edit, source, BEFORE, AFTER) == pytest.approx(-forth, abs=1e-5)
    assert clip.direction(source, edit, AFTER, BEFORE) == pytest.approx(-forth, abs=1e-5)
    assert clip.direction(edit, source, AFTER, BEFORE) == pytest.approx(forth, abs=1e-5)


def test_nothing_changed(clip: ClipJudge) -> None:
    assert clip.similarity(picture(2), picture(2)) == pytest.approx(1)
    assert clip.direction(picture(2), picture(2), BEFORE, AFTER) == 0
    assert clip.direction(picture(2), picture(3), BEFORE, BEFORE) == 0


def test_a_long_caption_is_cut(clip: ClipJudge) -> None:
    assert -1 <= clip.direction(picture(0), picture(1), BEFORE, "zombies " * 50) <= 1


def test_it_is_measured_beside_the_rest(clip: ClipJudge) -> None:
    sources, edits = [picture(n) for n in range(3)], [picture(10 + n) for n in range(3)]
    prompt = Prompt(instruction="turn him into a zombie", before=BEFORE, after=AFTER)
    for found, source, edit in zip(measure([*"abc"], sources, edits, [], clip, prompt), sources, edits, strict=True):
        assert found.text_direction == pytest.approx(clip.direction(source, edit, BEFORE, AFTER), abs=1e-5)
        assert found.identity == pytest.approx(clip.similarity(source, edit), abs=1e-5)
    (without,) = measure(["a"], sources[:1], edits[:1], [], clip)
    assert without.text_direction is None
    assert without.identity == pytest.approx(clip.similarity(sources[0], edits[0]), abs=1e-5)


def test_missing_weights_are_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"^quality\.clip: no CLIPVisionModelWithProjection at .*nowhere"):
        ClipJudge(tmp_path / "nowhere")
    text_only = transformers.CLIPTextModelWithProjection.from_pretrained(folder)
    text_only.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"^quality\.clip: .*text"):
        ClipJudge(tmp_path / "text")
    other = save_clip(tmp_path / "other", vocab_size=600)
    with pytest.raises(UserError, match="has 514 entries, the text model 600"):
        ClipJudge(other)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (other / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"^quality\.clip: "):
        ClipJudge(other)
