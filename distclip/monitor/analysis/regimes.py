"""Where the level of the norms changes: warm-up, and the regimes after it.

Binary segmentation (Scott and Knott 1974) of block medians of log-norms. A change must be worth it in three ways: the
squared error it saves, against the scatter of neighbouring blocks; the factor between the levels; and how long it
lasts, so that neither a spike nor a burst of them is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .log import Log, Numbers

__all__ = ["Regimes", "Segment", "find_regimes"]

BLOCK = 5
"""Steps of a block at least: two spikes in one do not move its median."""

BLOCKS = 1000
"""At most."""

SHORTEST = 0.05
"""Of the run: what does not last so long moves no percentile that one would clip at."""

FACTOR = 1.5
"""Between two levels at least."""

PENALTY = 10.0
"""Times variance times log(blocks). 2 would do for independent blocks (BIC); neighbouring norms are alike."""

WARM_UP = 1 / 3
"""Of the run at most."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch on which the norms keep their level.

    Args:
        start, stop: indices of the log's finite norms.
        first, last: steps.
        median: of its norms.
    """

    start: int
    stop: int
    first: int
    last: int
    median: float

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Regimes:
    """How a run's norms went.

    Args:
        norms: (n,) the finite ones.
        where: (n,) their indices in the log.
        warm_up: segments that ended in the first third of the run; none where the first one goes on beyond it.
        settled: those after them, at least one where there are norms.
    """

    norms: Numbers
    where: NDArray[np.int64]
    warm_up: tuple[Segment, ...]
    settled: tuple[Segment, ...]

    @property
    def last(self) -> Segment:
        """The regime at the end: what the run would have gone on with."""
        return self.settled[-1]

    def of(self, segment: Segment) -> Numbers:
        """A segment's norms."""
        return self.norms[segment.start : segment.stop]


def find_regimes(log: Log) -> Regimes:
    """The warm-up of a run and its regimes after that.

    Args:
        log: of any length; steps whose norms are not finite count as not there.
    """
    where = np.flatnonzero(np.isfinite(log.norms))
    norms = log.norms[where]
    if not len(norms):
        return Regimes(norms, where, (), ())
    size = max(BLOCK, math.ceil(len(norms) / BLOCKS))
    levels = _block_medians(norms, size)
    bounds = [0, *(edge * size for edge in _edges(levels)), len(norms)]
    segments = tuple(
        Segment(start, stop, int(log.steps[where[start]]), int(log.steps[where[stop - 1]]), _median(norms[start:stop]))
        for start, stop in pairwise(bounds)
    )
    early = sum(segment.stop <= WARM_UP * len(norms) for segment in segments)
    return Regimes(norms, where, segments[:early], segments[early:])


def _block_medians(norms: Numbers, size: int) -> Numbers:
    """Of the logarithms; steps that are left over at the end belong to the last block."""
    count = max(1, len(norms) // size)
    whole = norms[: count * size].reshape(count, -1) if len(norms) >= size else norms[None]
    # A gradient of zeros has no logarithm; the smallest number has.
    medians: Numbers = np.log(np.maximum(np.median(whole, axis=1), np.finfo(np.float64).tiny))
    return medians


def _edges(levels: Numbers) -> list[int]:
    """The blocks at which the level changes."""
    steps = np.abs(np.diff(levels))
    variance = (1.4826 * float(np.median(steps))) ** 2 / 2 if len(steps) else 0.0
    shortest = max(4, math.ceil(SHORTEST * len(levels)))
    # Bursts of spikes fill a block or two.
    smooth = np.median(sliding_window_view(np.pad(levels, 2, mode="edge"), 5), axis=1)
    return sorted(_split(smooth, 0, shortest, PENALTY * variance * math.log(max(2, len(levels)))))


def _split(levels: Numbers, offset: int, shortest: int, penalty: float) -> Iterator[int]:
    count = len(levels)
    if count < 2 * shortest:
        return
    sizes = np.arange(1, count)
    sums = np.cumsum(levels - levels.mean())[:-1]
    saved = sums**2 * count / (sizes * (count - sizes))
    edge = shortest + int(np.argmax(saved[shortest - 1 : count - shortest]))
    before, after = levels[:edge], levels[edge:]
    if saved[edge - 1] <= penalty or abs(_median(before) - _median(after)) < math.log(FACTOR):
        return
    yield offset + edge
    yield from _split(before, offset, shortest, penalty)
    yield from _split(after, offset + edge, shortest, penalty)


def _median(values: Numbers) -> float:
    return float(np.median(values))
