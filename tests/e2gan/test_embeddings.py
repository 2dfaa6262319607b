import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2gan.embeddings import CHUNK, ClipImageEmbedding, OnnxImageEmbedding, thumbnail_embedding
from e2gan.selection import similarity_clusters

DATA = Path(os.environ.get("FARM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def noise(n: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def flat(*colour: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)


def test_thumbnail_of_flat_images_is_their_colour_in_oklab() -> None:
    white, red, black = (thumbnail_embedding(flat(*rgb))[0] for rgb in ((255,) * 3, (255, 0, 0), (0,) * 3))
    # Ottosson's own figures, of white and of sRGB red.
    np.testing.assert_allclose(white.reshape(5, 64)[:3, 0] * 8, [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(red.reshape(5, 64)[:3, 0] * 8, [0.62796, 0.22486, 0.12585], atol=1e-4)
    assert not white[192:].any()
    assert not black.any()
    assert np.linalg.norm(white - black) == pytest.approx(1.0, abs=1e-4)  # the colours' distance, over the image


def test_thumbnail_tells_directions_apart() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 3, 64, 64)
    across, down = thumbnail_embedding(ramp)[0, 192:], thumbnail_embedding(ramp.mT)[0, 192:]
    assert across.reshape(8, 16)[0].all() and not across.reshape(8, 16)[1:7].any()
    assert down.reshape(8, 16)[4].all() and not down.reshape(8, 16)[[0, 1, 2, 6, 7]].any()
    assert np.linalg.norm(across) == pytest.approx(0.5)
    flipped = thumbnail_embedding(ramp.flip(3))[0, 192:].reshape(8, 4, 4)[:, :, ::-1]
    np.testing.assert_allclose(flipped.ravel(), across, atol=1e-6)  # opposite directions are one


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (64, 64), (200, 150)])
def test_thumbnail_takes_any_size(size: tuple[int, int]) -> None:
    images = noise(70, *size)
    embeddings = thumbnail_embedding(images)
    assert embeddings.shape == (70, 320)
    assert embeddings.dtype == np.float64
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(thumbnail_embedding(images[66:67])[0], embeddings[66], rtol=1e-12, atol=1e-12)


def test_near_duplicates_lie_closer_than_other_photographs() -> None:
    from PIL import Image

    files = sorted((DATA / "photos").glob("*.jpg"))[:24]
    if not files:
        pytest.skip(f"no photographs under {DATA}; set FARM_TEST_DATA")
    photos = [Image.open(file).convert("RGB").resize((96, 96)) for file in files]
    brighter = [photo.point(lambda value: min(255, int(value * 1.1))) for photo in photos]
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in photos + brighter])
    e = thumbnail_embedding(images)
    distances = np.linalg.norm(e[:24, None] - e[None, 24:], axis=2)
    assert (distances.argmin(axis=1) == np.arange(24)).all()
    # Clustering into as many as there are scenes keeps about one picture of each.
    chosen = similarity_clusters(e, [f"{i % 24:02}-{i // 24}" for i in range(48)], 24, seed=0)
    assert len({name[:2] for name in chosen}) >= 23


def test_clip_image_embedding_of_a_tiny_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    images = noise(3, 48, 64)
    embeddings = ClipImageEmbedding(tmp_path)(images)
    assert embeddings.shape == (3, 16)
    assert embeddings.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1)

    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    with torch.no_grad():
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        expected = torch.nn.functional.normalize(model(pixel_values=pixels).image_embeds, dim=1)
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=2e-3)


def test_missing_clip_says_how_to_fetch_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"no CLIPVisionModelWithProjection at .*hf download"):
        ClipImageEmbedding(tmp_path)
    with pytest.raises(ValueError, match=r"at 'farm/no-such-model'.*hf download"):
        ClipImageEmbedding("farm/no-such-model")


def test_only_stacks_of_bytes_are_embedded() -> None:
    for images in (torch.zeros(1, 3, 8, 8), noise(0)):
        with pytest.raises(ValueError, match="uint8"):
            thumbnail_embedding(images)


def write_model(path: Path, shape: list[Any], kind: str = "FLOAT", operator: str = "ReduceMean") -> Path:
    """A model whose first output is the mean of every channel (ReduceMean), or something else of the images."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    element = getattr(onnx.TensorProto, kind)
    options = {"axes": [2, 3], "keepdims": 0} if operator.startswith("Reduce") else {}
    graph = helper.make_graph(
        [helper.make_node(operator, ["image"], ["embedding"], **options)],
        "embed",
        [helper.make_tensor_value_info("image", element, shape)],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.INT64 if operator == "Shape" else element, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def unit_means(images: Tensor, mean: Any = 127.5, std: Any = 128.0) -> np.ndarray:
    """Mean colours as FaceNet takes them, as unit vectors."""
    rows = (images.double().mean(dim=(2, 3)).numpy() - np.asarray(mean)) / np.asarray(std)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_onnx_embedding_of_a_tiny_model(tmp_path: Path, batch: str | int) -> None:
    images = noise(CHUNK + 6, 32, 32)
    embed = OnnxImageEmbedding(write_model(tmp_path / "mean.onnx", [batch, 3, 32, 32]))
    embeddings = embed(images)
    assert embeddings.dtype == np.float64
    np.testing.assert_allclose(embeddings, unit_means(images), atol=1e-5)
    np.testing.assert_allclose(embed(images[5:6]), embeddings[5:6], atol=1e-6)


def test_onnx_embedding_sees_the_centre_square_at_its_own_size(tmp_path: Path) -> None:
    images = noise(2, 16, 16).repeat_interleave(3, 2).repeat_interleave(3, 3)
    wide = torch.cat([torch.full((2, 3, 48, 20), 255, dtype=torch.uint8), images, noise(2, 48, 20)], dim=3)
    fixed = OnnxImageEmbedding(write_model(tmp_path / "fixed.onnx", ["n", 3, 48, 48]))
    np.testing.assert_allclose(fixed(wide), unit_means(images), atol=1e-5)
    free = OnnxImageEmbedding(write_model(tmp_path / "free.onnx", ["n", 3, "h", "w"], operator="Shape"), size=24)
    with pytest.raises(ValueError, match=r"turned \[2, 3, 24, 24\] into int64 \[4\]"):
        free(wide)


def test_onnx_embedding_with_other_statistics(tmp_path: Path) -> None:
    path, images = write_model(tmp_path / "mean.onnx", ["n", 3, 16, 16]), noise(3, 16, 16)
    mean, std = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    np.testing.assert_allclose(
        OnnxImageEmbedding(path, mean=mean, std=std)(images), unit_means(images, mean, std), 1e-4
    )


def test_onnx_models_that_are_no_embedding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none\.onnx: name an ONNX model that embeds images"):
        OnnxImageEmbedding(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX model that can be loaded"):
        OnnxImageEmbedding(tmp_path / "text.onnx")
    shapes: list[tuple[list[Any], str]] = [
        (["n", 1, 16, 16], "FLOAT"),
        (["n", 3, 16, 24], "FLOAT"),
        (["n", 16, 16, 3], "FLOAT"),
        (["n", 768], "FLOAT"),
        (["n", 3, 16, 16], "DOUBLE"),
    ]
    for shape, kind in shapes:
        with pytest.raises(ValueError, match=r"takes tensor\(.*: export it for one input, float32 \[n, 3, s, s\]"):
            OnnxImageEmbedding(write_model(tmp_path / "odd.onnx", shape, kind, "Relu"))
    for operator, says in (
        ("Relu", r"into float32 \[2, 3, 16, 16\]"),
        ("ReduceLogSum", r"into float32 \[2, 3\]"),  # of black, which is negative: NaN
    ):
        embed = OnnxImageEmbedding(write_model(tmp_path / "odd.onnx", ["n", 3, 16, 16], operator=operator))
        with pytest.raises(
            ValueError, match=rf"{says}: export it so that its first output is float32 \[n, d\], finite"
        ):
            embed(flat(0, 0, 0).repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="uint8"):
        OnnxImageEmbedding(write_model(tmp_path / "mean.onnx", ["n", 3, 16, 16]))(noise(0))
