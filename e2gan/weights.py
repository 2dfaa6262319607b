"""Tensors as safetensors bytes that are the same for the same tensors and tell when they were changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor


def save_weights(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    """The tensors with string metadata, and `sha256` over all of it, as one safetensors file.

    The header is written here: safetensors writes several metadata keys in an order that changes from call to call.
    """
    header, body = _split(safetensors.torch.save({name: t.detach().contiguous() for name, t in tensors.items()}))
    header["__metadata__"] = metadata
    return _sealed(header, body)


def load_weights(data: bytes, *, sealed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a `sha256`, which files by other libraries lack, must hold.

    sealed: refuse a file without `sha256`, so that every byte of it is known to be as it was saved.

    Raises:
        ValueError: the file is truncated, changed, or no safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
        header, body = _split(data)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error
    metadata: dict[str, str] = header.get("__metadata__", {})
    digest = metadata.pop("sha256", None)
    header["__metadata__"] = metadata
    if digest is None and sealed:
        raise ValueError("these weights were changed after they were saved, or by another library: they have no sha256")
    if digest is not None and data != _sealed(header, body):
        raise ValueError("these weights were changed after they were saved: their sha256 does not hold")
    return tensors, metadata


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:end])
    return header, data[end:]


def _sealed(header: Mapping[str, Any], body: bytes) -> bytes:
    """The file with the digest of header and body among its metadata."""
    digest = hashlib.sha256(_encode(header) + body).hexdigest()
    encoded = _encode({**header, "__metadata__": {**header["__metadata__"], "sha256": digest}})
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + body


def _encode(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
