from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edits import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.editors import OnnxSettings, Prompt, editor_fingerprint, open_editor
from farm.editors.onnx import OnnxEditor
from farm.errors import UserError

onnx = pytest.importorskip("onnx")

ANY = ["batch", 3, "height", "width"]

PROMPT = Prompt(instruction="not read", before="a photo", after="a picture")


def write_model(
    path: Path,
    nodes: list[Any],
    *,
    shape: list[Any] = ANY,
    kind: str = "FLOAT",
    gives: str = "FLOAT",
    **weights: Any,
) -> None:
    """A model from `image` to `edited` whose weights are initialisers of the names given."""
    from onnx import TensorProto, helper, numpy_helper

    element = getattr(TensorProto, kind)
    graph = helper.make_graph(
        nodes,
        "edit",
        [helper.make_tensor_value_info("image", element, shape)],
        [helper.make_tensor_value_info("edited", getattr(TensorProto, gives), None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def node(kind: str, *inputs: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, list(inputs), ["edited"], **attributes)


def open_model(path: Path, **options: Any) -> OnnxEditor:
    editor = open_editor(OnnxSettings(path=str(path), **options), "any-concept")
    assert isinstance(editor, OnnxEditor)
    return editor


@pytest.fixture(scope="module")
def negative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives `1 - image` with red and blue exchanged, as a 1x1 convolution."""
    path = tmp_path_factory.mktemp("models") / "negative.onnx"
    weight = -np.eye(3, dtype=np.float32)[::-1].reshape(3, 3, 1, 1)
    write_model(path, [node("Conv", "image", "w", "b")], w=weight, b=np.ones(3, np.float32))
    return path


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=0, max_size=7),
    batch_size=st.integers(1, 4),
)
def test_the_model_is_applied_to_every_image(negative: Path, sizes: list[tuple[int, int]], batch_size: int) -> None:
    images = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    edited = open_model(negative, batch_size=batch_size).edit(images, PROMPT, [0] * len(images))
    for image, result in zip(images, edited, strict=True):
        assert result.dtype == np.uint8
        assert np.array_equal(result, 255 - image[..., ::-1])


def test_padding_reflects(tmp_path: Path) -> None:
    """A model that moves everything left by one pixel shows what lies behind the right border."""
    path = tmp_path / "left.onnx"
    shift = np.zeros((3, 1, 1, 3), np.float32)
    shift[..., 2] = 1
    write_model(path, [node("Conv", "image", "w", group=3, pads=[0, 1, 0, 1])], w=shift)
    image = noise(5, 6)
    (result,) = open_model(path).edit([image], PROMPT, [0])
    assert np.array_equal(result[:, :-1], image[:, 1:])
    assert np.array_equal(result[:, -1], image[:, -2])


def test_models_of_one_batch_size_or_image_size(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    write_model(path, [node("Identity", "image")], shape=[2, 3, 8, 8])
    images = [noise(8, 8, seed) for seed in range(3)]
    edited = open_model(path).edit(images, PROMPT, [0, 0, 0])
    assert all(np.array_equal(a, b) for a, b in zip(images, edited, strict=True))
    with pytest.raises(UserError, match=r"takes images of 8 x 8 pixels only, not 12 x 8 \(see sources\.size\)"):
        open_model(path).edit([noise(12, 8)], PROMPT, [0])


def test_values_are_clipped_and_rounded(tmp_path: Path) -> None:
    path = tmp_path / "bright.onnx"
    write_model(path, [node("Add", "image", "b")], b=np.float32(0.501))
    (result,) = open_model(path).edit([noise(8, 8)], PROMPT, [0])
    expected = np.rint((noise(8, 8) / 255 + 0.501).clip(0, 1) * 255)
    assert np.array_equal(result, expected)


def refusals(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    found = {name: tmp_path / f"{name}.onnx" for name in ("text", "empty", "rank", "grey", "bytes")}
    found["text"].write_text("not a model")
    found["empty"].write_bytes(b"")
    write_model(found["rank"], [node("Identity", "image")], shape=["n", 3])
    write_model(found["grey"], [node("Identity", "image")], shape=["n", 1, "h", "w"])
    write_model(found["bytes"], [node("Cast", "image", to=1)], kind="UINT8")
    says = dict.fromkeys(("rank", "grey", "bytes"), "has an input")
    says |= {"text": "is not an ONNX model", "empty": "is not an ONNX model"}
    return {name: (found[name], says[name]) for name in says}


@pytest.mark.parametrize("case", ["text", "empty", "rank", "grey", "bytes"])
def test_a_file_that_is_no_such_model_is_refused(tmp_path: Path, case: str) -> None:
    path, says = refusals(tmp_path)[case]
    with pytest.raises(UserError, match=says) as caught:
        open_model(path)
    told(caught.value, path)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: [node("Slice", "image", "zero", "two", "axes")], r"turned float32 \(1, 3, 8, 8\) into"),
        (lambda: [node("Log", "image")], "NaN or infinite"),
        (lambda: [node("Mul", "image", "big")], "instead of 0..1"),
        (lambda: [node("Cast", "image", to=11)], "into float64"),
        (lambda: [node("Reshape", "image", "axes")], "failed on images of 8 x 8"),
    ],
)
def test_wrong_output_is_refused(tmp_path: Path, bad: Any, says: str) -> None:
    path = tmp_path / "bad.onnx"
    zero, two, axes = (np.array([number], np.int64) for number in (0, 2, 2))
    gives = "DOUBLE" if "float64" in says else "FLOAT"
    write_model(path, bad(), gives=gives, zero=zero, two=two, axes=axes, big=np.float32(255))
    editor = open_model(path)
    image = noise(8, 8)
    image[0, 0] = 0
    with pytest.raises(UserError, match=says) as caught:
        editor.edit([image], PROMPT, [0])
    told(caught.value, path)


@pytest.mark.parametrize("call", [open_editor, editor_fingerprint])
@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_missing_file_is_refused(tmp_path: Path, name: str, call: Any) -> None:
    with pytest.raises(UserError, match="there is no file") as caught:
        call(OnnxSettings(path=str(tmp_path / name)), "any-concept")
    told(caught.value, tmp_path / name)


def told(error: UserError, path: Path) -> None:
    text = str(error)
    assert text.startswith("editor.path: ")
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path: Path, negative: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(negative.read_bytes())
    first = editor_fingerprint(OnnxSettings(path=str(negative)), "a")
    assert first == editor_fingerprint(OnnxSettings(path=str(copy), batch_size=1), "b")
    write_model(copy, [node("Identity", "image")])
    assert first != editor_fingerprint(OnnxSettings(path=str(copy)), "a")


def test_threads_follow_the_task(negative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert open_model(negative)._session.get_session_options().intra_op_num_threads == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert open_model(negative)._session.get_session_options().intra_op_num_threads == 0
    chosen = OnnxEditor(OnnxSettings(path=str(negative)), threads=2)
    assert chosen._session.get_session_options().intra_op_num_threads == 2


def test_a_real_teacher_does_not_see_the_batch() -> None:
    data = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
    path = data / "teachers/udnie.onnx"
    if not path.is_file():
        pytest.skip(f"no trained teacher at {path}; set FARM_TEST_DATA")
    import PIL.Image

    names = sorted((data / "photos").rglob("*.jpg"))[:3]
    images = [np.asarray(PIL.Image.open(name).convert("RGB"))[:97, :126] for name in names]
    together = open_model(path).edit(images, PROMPT, [0, 1, 2])
    alone = [open_model(path, batch_size=1).edit([image], PROMPT, [5])[0] for image in images]
    for image, first, second in zip(images, together, alone, strict=True):
        assert np.array_equal(first, second)
        assert first.shape == image.shape
        assert 20 < np.abs(first.astype(float) - image).mean() < 128
