"""Fewer points of a long curve, among them everything that sticks out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..analysis.log import Numbers
from .words import median

__all__ = ["Indices", "crests", "sample", "thin", "trend"]

Indices: TypeAlias = NDArray[np.int64]
"""Places in a column, increasing."""


def thin(values: Numbers, buckets: int, keep: Iterable[int] = ()) -> Indices:
    """Which points of a curve to draw: of every bucket the least and the largest, so that no extreme is lost.

    Args:
        values: (n,) of the curve; NaN leaves a gap.
        buckets: into how many equal parts it is cut; a curve of up to twice as many points stays whole.
        keep: places that are drawn in any case.

    Example:
        >>> thin(np.array([1.0, 1, 9, 1, 1, 1, -5, 1]), 2)
        array([0, 2, 4, 6, 7])
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    chosen = {0, len(values) - 1, *keep}
    for start, stop in _cuts(len(values), buckets):
        part = values[start:stop]
        if np.isfinite(part).any():
            chosen |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        else:
            chosen.add(start)
    return np.array(sorted(chosen), np.int64)


def crests(values: Numbers, marked: NDArray[np.bool_], buckets: int) -> tuple[Indices, Indices]:
    """Where to mark steps of which there may be millions: once in a bucket, at the largest.

    Args:
        values: (n,) of the curve that is marked.
        marked: (n,) which steps.
        buckets: into how many equal parts it is cut.

    Returns:
        the places, and how many marked steps each stands for.
    """
    if len(values) <= 2 * buckets:
        places = np.flatnonzero(marked & np.isfinite(values))
        return places, np.ones(len(places), np.int64)
    found = []
    for start, stop in _cuts(len(values), buckets):
        here = marked[start:stop] & np.isfinite(values[start:stop])
        if here.any():
            highest = int(np.argmax(np.where(here, values[start:stop], -np.inf)))
            found.append((start + highest, int(here.sum())))
    places, counts = np.array(found, np.int64).reshape(-1, 2).T
    return places, counts


def trend(values: Numbers, buckets: int) -> tuple[Indices, Numbers]:
    """The median of every bucket of a curve, and its place: in the middle. NaN where nothing in it is finite."""
    cuts = _cuts(len(values), buckets)
    places = np.array([(start + stop) // 2 for start, stop in cuts], np.int64)
    return places, np.array([median(values[start:stop]) for start, stop in cuts])


def sample(places: Indices, most: int) -> Indices:
    """So many of them at most, evenly, with the first and the last.

    Example:
        >>> sample(np.arange(100), 3)
        array([ 0, 50, 99])
    """
    if len(places) <= most:
        return places
    chosen: Indices = places[np.linspace(0, len(places) - 1, most).round().astype(np.int64)]
    return chosen


def _cuts(size: int, buckets: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, size, buckets + 1).astype(np.int64).tolist()
    return [(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True) if start < stop]
