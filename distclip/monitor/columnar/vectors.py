"""Encode vectors of numbers as base64 text in lines of JSON, and decode them."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["decode", "encode", "to_float32"]

_KEY = "float32"

_MAX = float(np.finfo(np.float32).max)


def encode(values: ArrayLike) -> dict[str, str]:
    """Encode numbers as float32. Numbers that are not finite become NaN.

    >>> encode([1.0, 2.0])
    {'float32': 'AACAPwAAAEA='}
    """
    return {_KEY: base64.b64encode(to_float32(values).astype("<f4", copy=False).tobytes()).decode()}


def decode(value: Any) -> NDArray[np.float32] | None:
    """Decode what `encode` returned. Return None for anything else.

    >>> decode(encode([1.0, float("inf")]))
    array([ 1., nan], dtype=float32)
    """
    text = value.get(_KEY) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return None
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32, copy=False)
    except (ValueError, binascii.Error):
        return None


def to_float32(values: ArrayLike) -> NDArray[np.float32]:
    """Convert numbers to float32, with NaN where a number is not finite.

    Finite numbers beyond its range become its largest number.
    """
    numbers = np.asarray(values)
    with np.errstate(over="ignore"):
        converted = numbers.astype(np.float32)
    if np.isfinite(converted).all():
        return converted
    numbers = numbers.astype(np.float64)
    return np.where(np.isfinite(numbers), np.clip(numbers, -_MAX, _MAX), np.nan).astype(np.float32)
