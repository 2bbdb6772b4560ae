"""Select points of long curves so that every extreme is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..analysis.statistics import Numbers, finite_median

__all__ = ["Indices", "bucket_medians", "bucket_peaks", "downsample", "sample_evenly"]

Indices: TypeAlias = NDArray[np.int64]
"""Indices of a column, increasing."""


def downsample(values: Numbers, num_buckets: int, keep: Iterable[int] = ()) -> Indices:
    """Select the minimum and the maximum of every bucket of a curve.

    Args:
        values: (n,) of the curve; NaN for a gap.
        num_buckets: number of equal parts. A curve of up to twice as many points is returned whole.
        keep: indices that are always selected.

    Example:
        >>> downsample(np.array([1.0, 1, 9, 1, 1, 1, -5, 1]), 2)
        array([0, 2, 4, 6, 7])
    """
    if len(values) <= 2 * num_buckets:
        return np.arange(len(values))
    selected = {0, len(values) - 1, *keep}
    for start, stop in _buckets(len(values), num_buckets):
        part = values[start:stop]
        if np.isfinite(part).any():
            selected |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        else:
            # One NaN keeps the gap visible.
            selected.add(start)
    return np.array(sorted(selected), np.int64)


def bucket_peaks(values: Numbers, marked: NDArray[np.bool_], num_buckets: int) -> tuple[Indices, Indices]:
    """Select the highest marked step of every bucket.

    Args:
        values: (n,) of the curve that carries the marks.
        marked: (n,) steps to mark, possibly millions.
        num_buckets: number of equal parts.

    Returns:
        The selected indices, and the number of marked steps that each one represents.
    """
    if len(values) <= 2 * num_buckets:
        indices = np.flatnonzero(marked & np.isfinite(values))
        return indices, np.ones(len(indices), np.int64)
    peaks = []
    for start, stop in _buckets(len(values), num_buckets):
        in_bucket = marked[start:stop] & np.isfinite(values[start:stop])
        if in_bucket.any():
            highest = int(np.argmax(np.where(in_bucket, values[start:stop], -np.inf)))
            peaks.append((start + highest, int(in_bucket.sum())))
    indices, counts = np.array(peaks, np.int64).reshape(-1, 2).T
    return indices, counts


def bucket_medians(values: Numbers, num_buckets: int) -> tuple[Indices, Numbers]:
    """Return the middle index and the median of every bucket. The median is NaN where no value is finite."""
    buckets = _buckets(len(values), num_buckets)
    middles = np.array([(start + stop) // 2 for start, stop in buckets], np.int64)
    return middles, np.array([finite_median(values[start:stop]) for start, stop in buckets])


def sample_evenly(indices: Indices, limit: int) -> Indices:
    """Select at most `limit` indices, evenly spaced, with the first and the last one.

    Example:
        >>> sample_evenly(np.arange(100), 3)
        array([ 0, 50, 99])
    """
    if len(indices) <= limit:
        return indices
    selected: Indices = indices[np.linspace(0, len(indices) - 1, limit).round().astype(np.int64)]
    return selected


def _buckets(size: int, num_buckets: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, size, num_buckets + 1).astype(np.int64).tolist()
    return [(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True) if start < stop]
