"""Summarize the norms of tensors over stretches of steps (`Level`), and select the exact values around outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BUCKET",
    "FACTOR",
    "Cells",
    "Level",
    "Norms",
    "Steps",
    "coarsen",
    "join_levels",
    "select_cells",
    "summarize",
]

Norms: TypeAlias = NDArray[np.float32]
"""Norms of tensors, with NaN where a norm is missing or not finite."""

Steps: TypeAlias = NDArray[np.int64]
"""Numbers of steps, increasing."""

BUCKET = 256
"""Number of steps in a row of level 0."""

FACTOR = 8
"""Number of rows of a level that one row of the next level summarizes."""

MIN_RATIO = 3.0
"""Minimum ratio of an outlier to the median of its tensor."""

MAX_OUTLIERS = 256
"""Maximum number of outliers of single tensors per part."""

NEARBY_OF_TENSOR = 8
"""Number of steps before and after an outlier of one tensor in which the norms of that tensor are kept."""

NEARBY_OF_STEP = 2
"""Number of steps before and after an outlier of the whole norm in which the norms of all tensors are kept."""

SAMPLE = 8
"""Stride of the steps that the median of a tensor is computed from."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Args:
        first: (rows,) first step that a row summarizes.
        last: (rows,) last step.
        low: (rows, tensors) smallest norm; NaN if none was finite.
        high: (rows, tensors) largest norm.
        end: (rows, tensors) norm at the last step.
    """

    first: Steps
    last: Steps
    low: Norms
    high: Norms
    end: Norms

    def __len__(self) -> int:
        return len(self.first)

    def take(self, rows: slice) -> Level:
        """Return some of the rows."""
        return Level(self.first[rows], self.last[rows], self.low[rows], self.high[rows], self.end[rows])


@dataclass(frozen=True)
class Cells:
    """Norms of single tensors at single steps.

    Args:
        steps: (cells,) number of the step.
        tensors: (cells,) index of the tensor.
        norms: (cells,) norm.
    """

    steps: Steps
    tensors: NDArray[np.int32]
    norms: Norms

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, cells: NDArray[np.bool_]) -> Cells:
        """Return the cells that a mask selects."""
        return Cells(self.steps[cells], self.tensors[cells], self.norms[cells])


def summarize(steps: Steps, norms: Norms, bucket: int = BUCKET) -> Level:
    """Summarize rows of norms.

    Args:
        steps: (rows,) numbers of their steps.
        norms: (rows, tensors).
        bucket: number of rows that become one.

    >>> level = summarize(np.arange(1, 6), np.array([[1.0], [9.0], [2.0], [np.nan], [3.0]], np.float32), bucket=2)
    >>> level.first.tolist(), level.high.ravel().tolist(), level.end.ravel().tolist()
    ([1, 3, 5], [9.0, 2.0, 3.0], [9.0, nan, 3.0])
    """
    starts = np.arange(0, len(steps), bucket)
    if not len(starts):
        return Level(steps, steps, norms, norms, norms)
    ends = np.append(starts[1:], len(steps)) - 1
    low, high = (extreme.reduceat(norms, starts, axis=0) for extreme in (np.fmin, np.fmax))
    return Level(steps[starts], steps[ends], low, high, norms[ends])


def coarsen(level: Level) -> Level:
    """Return the next level, in which one row summarizes eight rows."""
    starts = np.arange(0, len(level), FACTOR)
    ends = np.append(starts[1:], len(level)) - 1
    low, high = np.fmin.reduceat(level.low, starts, axis=0), np.fmax.reduceat(level.high, starts, axis=0)
    return Level(level.first[starts], level.last[ends], low, high, level.end[ends])


def join_levels(levels: Sequence[Level]) -> Level:
    """Join the rows of levels with the same tensors."""
    fields = ("first", "last", "low", "high", "end")
    return Level(*(np.concatenate([vars(level)[field] for level in levels]) for field in fields))


def select_cells(steps: Steps, norms: Norms, spikes: Sequence[int]) -> Cells:
    """Select the norms around outliers.

    Args:
        steps: (rows,) numbers of their steps.
        norms: (rows, tensors).
        spikes: numbers of the steps whose whole norm is an outlier.

    >>> norms = np.ones((100, 2), np.float32)
    >>> norms[50, 1] = 7
    >>> cells = select_cells(np.arange(1, 101), norms, [])
    >>> int(cells.steps[0]), int(cells.steps[-1]), set(cells.tensors.tolist()), float(cells.norms.max())
    (43, 59, {1}, 7.0)
    """
    if not norms.size:
        return Cells(steps[:0], np.zeros(0, np.int32), np.zeros(0, np.float32))
    kept: set[tuple[int, int]] = set()
    num_rows, num_tensors = norms.shape
    rows, tensors = _find_outliers(norms)
    for row, tensor in zip(rows.tolist(), tensors.tolist(), strict=True):
        kept.update(
            (i, tensor) for i in range(max(0, row - NEARBY_OF_TENSOR), min(num_rows, row + NEARBY_OF_TENSOR + 1))
        )
    whole = np.zeros(num_rows, np.bool_)
    for row in np.flatnonzero(np.isin(steps, spikes)).tolist():
        whole[max(0, row - NEARBY_OF_STEP) : row + NEARBY_OF_STEP + 1] = True
    single = np.array([cell for cell in kept if not whole[cell[0]]], np.int64).reshape(-1, 2)
    wide = np.flatnonzero(whole)
    cells = np.concatenate(
        [single, np.stack([wide.repeat(num_tensors), np.tile(np.arange(num_tensors), len(wide))], 1)]
    )
    cells = cells[np.lexsort((cells[:, 1], cells[:, 0]))]
    return Cells(steps[cells[:, 0]], cells[:, 1].astype(np.int32), norms[cells[:, 0], cells[:, 1]])


def _find_outliers(norms: Norms) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows and the tensors of the norms that exceed the median of their tensor most."""
    sample = np.sort(norms[:: SAMPLE if len(norms) > BUCKET else 1], axis=0)
    # NaN is sorted to the end, so the index of the other values' median is known.
    num_finite = np.isfinite(sample).sum(0)
    medians = np.take_along_axis(sample, np.maximum(num_finite - 1, 0)[None] // 2, 0)[0]
    limits = np.where(medians > 0, MIN_RATIO * medians, np.inf).astype(np.float32)
    # Few tensors have an outlier, and only their columns are searched.
    columns = np.flatnonzero(np.fmax.reduce(norms, axis=0) >= limits)
    rows, which = np.nonzero(norms[:, columns] >= limits[columns])
    tensors = columns[which]
    if len(rows) > MAX_OUTLIERS:
        ratios = norms[rows, tensors] / limits[tensors]
        largest = np.argpartition(-ratios, MAX_OUTLIERS)[:MAX_OUTLIERS]
        rows, tensors = rows[largest], tensors[largest]
    return rows, tensors
