import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2gan.text import ClipTextEncoder, HashingTextEncoder, TextEncoder

DATA = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
hashing: TextEncoder = HashingTextEncoder()


def likeness(a: str, b: str) -> float:
    return float(torch.cosine_similarity(hashing(a).flatten(), hashing(b).flatten(), dim=0))


def digest(embedding: Tensor) -> str:
    return hashlib.sha256(embedding.numpy().tobytes()).hexdigest()


def test_hashing_shape_and_scale() -> None:
    embedding = hashing("Vincent van Gogh style")
    assert embedding.shape == (77, 768)
    assert embedding.dtype == torch.float32
    assert embedding.std(dim=1).min() > 0.8
    assert embedding.std(dim=1).max() < 1.2
    assert embedding.mean().abs() < 0.1


def test_hashing_is_the_same_everywhere() -> None:
    # Published adapters hold embeddings: this value never changes, or the encoder's name does.
    expected = "0f0264eb16ddc69da081579fa794b712e0da805c5f118c6ce77692309ba74dc5"
    prompt = "a portrait in the style of Édouard Manet, 1880"
    assert hashing.name == "hashing-v1"
    assert digest(hashing(prompt)) == expected
    script = (
        "import hashlib, sys; from e2gan.text import HashingTextEncoder as E;"
        "print(hashlib.sha256(E()(sys.argv[1]).numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"}
    other = subprocess.run(
        [sys.executable, "-c", script, prompt], env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == expected


def test_hashing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    hashing("zombie")
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_words_are_felt() -> None:
    gogh = "a photo in the style of Vincent van Gogh"
    assert likeness(gogh, "A photo, in the style of Vincent van Gogh!") > 0.999
    assert likeness(gogh, "a photo in the style of Claude Monet") > likeness(gogh, "make them a zombie") + 0.1
    assert likeness("watercolor", "watercolour") > likeness("watercolor", "charcoal") + 0.05
    words = [hashing(word)[1] for word in ("watercolor", "watercolour", "charcoal")]
    assert torch.cosine_similarity(words[0], words[1], dim=0) > 0.3
    assert torch.cosine_similarity(words[0], words[2], dim=0).abs() < 0.2


def test_word_order_is_felt_a_little() -> None:
    assert not torch.equal(hashing("dog bites man"), hashing("man bites dog"))
    assert likeness("dog bites man", "man bites dog") > 0.9


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_hashing_takes_any_text(prompt: str) -> None:
    try:
        embedding = hashing(prompt)
    except ValueError as error:
        assert "words" in str(error)
        assert not any(character.isalnum() for character in prompt)
    else:
        assert embedding.shape == (77, 768)
        assert embedding.isfinite().all()


@pytest.mark.parametrize("prompt", ["", "  \n", "!?"])
def test_hashing_refuses_empty_prompts(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        hashing(prompt)
    with pytest.raises(ValueError, match="prompt"):
        hashing.cut(prompt)


def test_hashing_cuts_after_75_words() -> None:
    fits = " ".join(f"word{index}" for index in range(75))
    assert hashing.cut(fits) == ""
    assert hashing.cut(f"{fits} And, the rest") == "and, the rest"
    assert torch.equal(hashing(f"{fits} and the rest"), hashing(fits))
    assert not torch.equal(hashing(fits)[75], hashing(fits)[76])


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    bpe = DATA / "clip_bpe"
    if not bpe.is_dir():
        pytest.skip(f"no CLIP vocabulary at {bpe}; set FARM_TEST_DATA")
    folder = tmp_path_factory.mktemp("tiny_clip")
    torch.manual_seed(0)
    model_of(transformers, hidden_size=768).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer(vocab=str(bpe / "vocab.json"), merges=str(bpe / "merges.txt"))
    tokenizer.save_pretrained(folder)
    return folder


def model_of(transformers: Any, hidden_size: int) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> ClipTextEncoder:
    return ClipTextEncoder(tiny_clip)


def test_clip_is_the_last_hidden_state_without_a_mask(clip: ClipTextEncoder, tiny_clip: Path) -> None:
    import transformers

    embedding = clip("a Monet painting")
    assert embedding.shape == (77, 768)
    assert embedding.dtype == torch.float32
    assert embedding.std() == pytest.approx(1, abs=0.1)
    ids = torch.tensor([[49406, 320, 24499, 3086, *[49407] * 73]])
    with torch.no_grad():
        expected = transformers.CLIPTextModel.from_pretrained(tiny_clip)(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(embedding, expected)
    assert torch.equal(clip("a Monet painting"), embedding)


def test_clip_cuts_after_75_tokens(clip: ClipTextEncoder) -> None:
    fits = " ".join(["cat"] * 75)
    assert clip.cut("a Monet painting") == clip.cut(fits) == ""
    assert clip.cut(f"{fits} And a dog") == "And a dog"
    assert torch.equal(clip(f"{fits} and a dog"), clip(fits))
    with pytest.raises(ValueError, match="empty"):
        clip(" ")
    with pytest.raises(ValueError, match="empty"):
        clip.cut("")


def test_clip_is_named_by_its_weights(clip: ClipTextEncoder, tiny_clip: Path, tmp_path: Path) -> None:
    import transformers

    copy = tmp_path / "half"
    transformers.CLIPTextModel.from_pretrained(tiny_clip, dtype=torch.float16).save_pretrained(copy)
    transformers.CLIPTokenizer.from_pretrained(tiny_clip).save_pretrained(copy)
    half = ClipTextEncoder(copy)
    assert half.name == clip.name
    assert half("zombie").dtype == torch.float32
    torch.manual_seed(1)
    model_of(transformers, hidden_size=768).save_pretrained(copy)
    assert ClipTextEncoder(copy).name != clip.name


def test_clip_errors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"no CLIPTextModel at .*hf download"):
        ClipTextEncoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"at 'farm/no-such-model'.*hf download"):
        ClipTextEncoder("farm/no-such-model")
    model_of(transformers, hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="width 64, the generator takes 77 of 768"):
        ClipTextEncoder(tmp_path)
    model_of(transformers, hidden_size=768).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer at .* has 2 entries"):
        ClipTextEncoder(tmp_path)


def test_clip_refuses_half_a_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    model_of(transformers, hidden_size=768).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "final_layer_norm.weight" in name)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of CLIPTextModel, such as .*final_layer_norm"):
        ClipTextEncoder(tmp_path)
