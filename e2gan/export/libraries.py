"""The two libraries that exporting needs, which only the extra `export` installs."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

MISSING = "pip install 'e2gan-farm[export]'"


@cache
def coremltools() -> Any:
    """
    Raises:
        ValueError: coremltools is not installed.
    """
    logger = logging.getLogger("coremltools")
    logger.setLevel(logging.CRITICAL)  # it complains of every library that is newer, and of what only a Mac has
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
    except ModuleNotFoundError as error:
        raise ValueError(f"Core ML packages need coremltools: {MISSING}") from error
    logger.setLevel(logging.ERROR)
    return coremltools


@cache
def onnx() -> Any:
    """
    Raises:
        ValueError: onnx is not installed.
    """
    try:
        import onnx
        import onnx.external_data_helper
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX models need onnx: {MISSING}") from error
    return onnx
