"""Image tables and image pairs.

A table of images is a Parquet file with the columns `id` (string) and `image` (PNG bytes), so that pandas,
DuckDB or a dataset viewer can open it. A concept's pairs are the rows of source and edit tables that share an id.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

Image = NDArray[np.uint8]
"""An RGB image: uint8 `[height, width, 3]`, values 0..255."""


def write_table(images: Mapping[str, Image]) -> bytes:
    """Encode images, in the order given, as one Parquet file. The same images give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image as PILImage

    encoded = []
    for image in images.values():
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    table = pa.table({"id": pa.array(images.keys(), pa.string()), "image": pa.array(encoded, pa.binary())})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")
    return sink.getvalue()


def read_table(data: bytes, only: Container[str] | None = None) -> dict[str, Image]:
    """Decode a Parquet table of images into `{id: uint8 [height, width, 3]}`, in file order.

    only: the ids wanted; all when left out.

    Raises:
        ValueError: the bytes are not such a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image as PILImage

    try:
        table = pq.read_table(pa.BufferReader(data), columns=["id", "image"])
        return {
            row_id: np.asarray(PILImage.open(io.BytesIO(image)).convert("RGB"))
            for row_id, image in zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)
            if only is None or row_id in only
        }
    except (pa.ArrowException, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"not a Parquet table of images with columns id and image: {error}") from error


def to_tensor(images: Iterable[Image]) -> Tensor:
    """Stack uint8 HWC images of one size into a uint8 tensor `[n, 3, height, width]`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, the range the networks work in."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Float -1..1 (clipped) to uint8 0..255, rounding to nearest."""
    return images.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Source and target images of one concept.

    ids: one a pair, in order. source, target: uint8 `[n, 3, height, width]`, RGB 0..255.
    """

    ids: tuple[str, ...]
    source: Tensor
    target: Tensor

    @classmethod
    def from_images(cls, source: Mapping[str, Image], target: Mapping[str, Image], ids: Sequence[str]) -> Self:
        """Pair the images of `ids`, leaving out ids whose target is missing (an edit that failed).

        Raises:
            ValueError: no pair is left, a source is missing, or sizes differ.
        """
        kept = tuple(row_id for row_id in ids if row_id in target)
        missing = [row_id for row_id in kept if row_id not in source]
        if missing:
            raise ValueError(f"{len(missing)} edits have no source image, first {missing[0]!r}")
        if not kept:
            raise ValueError("no pair is left: none of the wanted ids has an edited image")
        for row_id in kept:
            if source[row_id].shape != target[row_id].shape or source[row_id].shape != source[kept[0]].shape:
                raise ValueError(
                    f"pair {row_id!r}: source {source[row_id].shape[:2]} and target {target[row_id].shape[:2]} "
                    f"must both have the size of the first pair, {source[kept[0]].shape[:2]}"
                )
        return cls(
            ids=kept,
            source=to_tensor(source[row_id] for row_id in kept),
            target=to_tensor(target[row_id] for row_id in kept),
        )

    def __len__(self) -> int:
        return len(self.ids)
