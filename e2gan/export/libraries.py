"""The libraries that exporting needs, which only the extra `export` installs."""

from __future__ import annotations

import gc
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from typing import Any

MISSING = "pip install 'e2gan-farm[export]'"


@cache
def coremltools() -> Any:
    """
    Raises:
        ValueError: coremltools is not installed.
    """
    try:
        with quietly():
            import coremltools
            import coremltools.optimize.coreml
    except ModuleNotFoundError as error:
        raise ValueError(f"Core ML packages need coremltools: {MISSING}") from error
    return coremltools


@cache
def onnx() -> Any:
    """
    Raises:
        ValueError: onnx, or what writes a network with it, is not installed.
    """
    if not all(map(find_spec, ("onnx", "onnxscript"))):
        raise ValueError(f"ONNX models need onnx and onnxscript: {MISSING}")
    import onnx

    return onnx


@contextmanager
def quietly() -> Iterator[None]:
    """Without the converters' progress bars and complaints: of what only a Mac has, of every library that is newer.

    What they leave behind is collected here, temporary folders among it, whose end is a warning too.
    """
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                gc.collect()
    finally:
        logging.disable(logging.NOTSET)
