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
        values: (n,) values of the curve; NaN for a gap.
        num_buckets: number of equal parts. A curve with up to twice as many points is returned whole.
        keep: indices that are always selected.

    Example:
        >>> downsample(np.array([1.0, 1, 9, 1, 1, 1, -5, 1]), 2)
        array([0, 2, 4, 6, 7])
    """
    if len(values) <= 2 * num_buckets:
        return np.arange(len(values))
    starts = _starts(len(values), num_buckets)
    finite = np.isfinite(values)
    # In a part without a finite value, its first index keeps the gap visible.
    extremes = (_first_maxima(np.where(finite, sign * values, -np.inf), starts) for sign in (-1, 1))
    return np.unique(np.concatenate([[0, len(values) - 1], np.fromiter(keep, np.int64), *extremes]))


def bucket_peaks(values: Numbers, marked: NDArray[np.bool_], num_buckets: int) -> tuple[Indices, Indices]:
    """Select the highest marked step of every bucket.

    Args:
        values: (n,) values of the curve that carries the marks.
        marked: (n,) whether to mark each step, possibly millions.
        num_buckets: number of equal parts.

    Returns:
        The selected indices, and the number of marked steps that each one represents.
    """
    if len(values) <= 2 * num_buckets:
        indices = np.flatnonzero(marked & np.isfinite(values))
        return indices, np.ones(len(indices), np.int64)
    starts = _starts(len(values), num_buckets)
    usable = marked & np.isfinite(values)
    counts = np.add.reduceat(usable, starts, dtype=np.int64)
    highest = _first_maxima(np.where(usable, values, -np.inf), starts)
    return highest[counts > 0], counts[counts > 0]


def bucket_medians(values: Numbers, num_buckets: int) -> tuple[Indices, Numbers]:
    """Return the middle index and the median of every bucket. The median is NaN where no value is finite."""
    starts = _starts(len(values), num_buckets)
    sizes = np.diff(np.append(starts, len(values)))
    medians = np.empty(len(starts))
    # The buckets have at most two sizes, and those of one size are the rows of a matrix.
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        parts = values[starts[same, None] + np.arange(size)]
        is_finite = np.isfinite(parts).all(axis=1)
        medians[same[is_finite]] = np.median(parts[is_finite], axis=1)
        medians[same[~is_finite]] = [finite_median(part) for part in parts[~is_finite]]
    return starts + sizes // 2, medians


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


def _starts(size: int, num_buckets: int) -> Indices:
    """Return the first index of each bucket."""
    return np.unique(np.linspace(0, size, num_buckets, endpoint=False).astype(np.int64))


def _first_maxima(values: Numbers, starts: Indices) -> Indices:
    """Return the first index of the maximum of each bucket."""
    sizes = np.diff(np.append(starts, len(values)))
    found = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), sizes))
    first: Indices = found[np.searchsorted(found, starts)]
    return first
