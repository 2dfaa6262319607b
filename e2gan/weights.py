"""Tensors as safetensors bytes that are the same for the same tensors and tell when they were changed.

What a file holds is known from its header, a JSON text: whoever knows which tensors there should be says so in
`shapes`, and another file is refused before a tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""
FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes of a number, by safetensors' name of its type."""
HEADER_BYTES = 1 << 20
"""The longest header of a file whose tensors are known: some thousand times what a generator's is."""


def save_weights(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    """The tensors with string metadata, and `sha256` over all of it, as one safetensors file.

    The header is written here: safetensors writes several metadata keys in an order that changes from call to call.
    """
    data = safetensors.torch.save({name: t.detach().contiguous() for name, t in tensors.items()})
    return _sealed({**read_header(data), "__metadata__": metadata}, data[_end(data) :])


def load_weights(
    data: bytes, *, sealed: bool = False, shapes: Shapes | None = None, dtypes: Collection[str] = tuple(FLOATS)
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a `sha256`, which files by other libraries lack, must hold.

    sealed: refuse a file without `sha256`, so that every byte of it is known to be as it was saved.
    shapes, dtypes: what the tensors have to be (see `check_shapes`); anything when there are no shapes.

    Raises:
        ValueError: the file is truncated, changed, no safetensors file, or has other tensors.
    """
    if shapes is not None:
        check_shapes(data, shapes, dtypes=dtypes)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error
    header, body = read_header(data), data[_end(data) :]
    metadata: dict[str, str] = header.get("__metadata__") or {}
    digest = metadata.pop("sha256", None)
    header["__metadata__"] = metadata
    if digest is None and sealed:
        raise ValueError("these weights were changed after they were saved, or by another library: they have no sha256")
    if digest is not None and data != _sealed(header, body):
        raise ValueError("these weights were changed after they were saved: their sha256 does not hold")
    return tensors, metadata


def check_shapes(data: bytes, shapes: Shapes, *, dtypes: Collection[str] = tuple(FLOATS)) -> None:
    """Refuse a safetensors file that holds other tensors than these, by its header and length alone.

    dtypes: those of FLOATS that the tensors may have. Where in the file they lie is safetensors' own to check, which it
    does before it makes one.

    Raises:
        ValueError: the file is cut, too long or none, or has another tensor.
    """
    header, size = read_header(data, HEADER_BYTES), 0
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name in sorted({*tensors, *shapes}):
        shown, entry = ascii(name[:80]), tensors.get(name)
        if name not in shapes:
            raise ValueError(f"other weights than were expected: there is no place for a tensor {shown}")
        if entry is None:
            raise ValueError(f"other weights than were expected: the tensor {shown} is missing")
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape = fields.get("dtype"), fields.get("shape")
        if shape != [*shapes[name]] or dtype not in dtypes:
            found = f"{str(dtype)[:20]} {str(shape)[:80]}"
            raise ValueError(
                f"other weights than were expected: {shown} is {found}, not {' or '.join(dtypes)} {[*shapes[name]]}"
            )
        size += FLOATS[fields["dtype"]] * math.prod(shapes[name])
    if (body := len(data) - _end(data)) != size:
        raise ValueError(f"not a whole safetensors file: {body:,} bytes of tensors, not {size:,}")


def largest_file(shapes: Shapes) -> int:
    """Bytes that no file of these tensors, none wider than float32, has more of."""
    return 8 + HEADER_BYTES + 4 * sum(math.prod(shape) for shape in shapes.values())


def read_header(data: bytes, at_most: int | None = None) -> dict[str, Any]:
    """The header of a safetensors file. ValueError when it is cut, none, or longer than `at_most` bytes."""
    end, limit = _end(data), len(data) if at_most is None else min(len(data), 8 + at_most)
    if len(data) < 8 or end > limit:
        raise ValueError(f"not a whole safetensors file: a header of {max(0, end - 8):,} bytes in {len(data):,}")
    try:
        header = json.loads(data[8:end], object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("not a whole safetensors file: its header is no mapping")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping; ValueError when it has a name twice, of which every reader would take the one it likes."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _end(data: bytes) -> int:
    """Where the header ends, as the file has it."""
    return 8 + int.from_bytes(data[:8], "little")


def _sealed(header: Mapping[str, Any], body: bytes) -> bytes:
    """The file with the digest of header and body among its metadata."""
    digest = hashlib.sha256(_encode(header) + body).hexdigest()
    encoded = _encode({**header, "__metadata__": {**header["__metadata__"], "sha256": digest}})
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + body


def _encode(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
