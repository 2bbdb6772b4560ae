"""Find the steps at which the level of the norms changes: the warm-up, and the regimes after it.

The method is binary segmentation (Scott and Knott 1974) of block medians of log-norms. A change must pass three tests:
it reduces the squared error by more than the scatter of neighbouring blocks explains, the levels differ by a minimum
factor, and both levels last long enough. So neither a spike nor a burst of spikes is a change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .log import Log, once_per_log
from .statistics import Numbers, robust_scale

__all__ = ["Regimes", "Segment", "find_regimes"]

MIN_BLOCK = 5
"""Minimum number of steps of a block. Two spikes in one block do not change its median."""

MAX_BLOCKS = 1000
"""Maximum number of blocks."""

MIN_LENGTH = 0.05
"""Minimum length of a level as a share of the run. A shorter level does not affect the percentiles used as bounds."""

MIN_FACTOR = 1.5
"""Minimum factor between two levels."""

PENALTY = 10.0
"""Factor of variance * log(blocks). Independent blocks would need 2 (BIC), but neighbouring norms are correlated."""

MAX_WARM_UP = 1 / 3
"""Maximum length of the warm-up as a share of the run."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the run in which the norms keep their level.

    Args:
        start: index of its first norm among the finite norms of the log.
        stop: index after its last norm.
        first: its first step.
        last: its last step.
        median: median of its norms.
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
    """The levels of a run's norms.

    Args:
        norms: (n,) finite norms.
        indices: (n,) their indices in the log.
        warm_up: segments that end in the first third of the run; empty if the first segment is longer.
        steady: segments after the warm-up, at least one if there are norms.
    """

    norms: Numbers
    indices: NDArray[np.int64]
    warm_up: tuple[Segment, ...]
    steady: tuple[Segment, ...]

    @property
    def last(self) -> Segment:
        """Segment at the end of the run, whose level the run would continue with."""
        return self.steady[-1]

    def norms_of(self, segment: Segment) -> Numbers:
        """Return the norms of a segment."""
        return self.norms[segment.start : segment.stop]


@once_per_log
def find_regimes(log: Log) -> Regimes:
    """Divide a run into its warm-up and the regimes after it.

    Args:
        log: log of any length. Steps without a finite norm are ignored.
    """
    indices = np.flatnonzero(np.isfinite(log.norms))
    norms = log.norms[indices]
    if not len(norms):
        return Regimes(norms, indices, (), ())
    size = max(MIN_BLOCK, math.ceil(len(norms) / MAX_BLOCKS))
    levels = _block_medians(norms, size)
    bounds = [0, *(edge * size for edge in _change_points(levels)), len(norms)]
    segments = tuple(
        Segment(
            start, stop, int(log.steps[indices[start]]), int(log.steps[indices[stop - 1]]), _median(norms[start:stop])
        )
        for start, stop in pairwise(bounds)
    )
    num_early = sum(segment.stop <= MAX_WARM_UP * len(norms) for segment in segments)
    return Regimes(norms, indices, segments[:num_early], segments[num_early:])


def _block_medians(norms: Numbers, size: int) -> Numbers:
    """Return the logarithms of the block medians. An incomplete block at the end is not used."""
    count = max(1, len(norms) // size)
    blocks = norms[: count * size].reshape(count, -1) if len(norms) >= size else norms[None]
    # A norm of 0 has no logarithm, so it is replaced by the smallest normal number.
    medians: Numbers = np.log(np.maximum(np.median(blocks, axis=1), np.finfo(np.float64).tiny))
    return medians


def _change_points(levels: Numbers) -> list[int]:
    """Return the blocks at which the level changes, increasing."""
    differences = np.diff(levels)
    # The difference of two blocks has twice the variance of one block.
    variance = robust_scale(differences) ** 2 / 2 if len(differences) else 0.0
    min_length = max(4, math.ceil(MIN_LENGTH * len(levels)))
    # A burst of spikes fills one or two blocks, so a median over five blocks removes it.
    smooth = np.median(sliding_window_view(np.pad(levels, 2, mode="edge"), 5), axis=1)
    return sorted(_split(smooth, 0, min_length, PENALTY * variance * math.log(max(2, len(levels)))))


def _split(levels: Numbers, offset: int, min_length: int, penalty: float) -> Iterator[int]:
    count = len(levels)
    if count < 2 * min_length:
        return
    sizes = np.arange(1, count)
    sums = np.cumsum(levels - levels.mean())[:-1]
    # This is the reduction of the squared error from one mean to two means, for each split.
    saved = sums**2 * count / (sizes * (count - sizes))
    edge = min_length + int(np.argmax(saved[min_length - 1 : count - min_length]))
    before, after = levels[:edge], levels[edge:]
    if saved[edge - 1] <= penalty or abs(_median(before) - _median(after)) < math.log(MIN_FACTOR):
        return
    yield offset + edge
    yield from _split(before, offset, min_length, penalty)
    yield from _split(after, offset + edge, min_length, penalty)


def _median(values: Numbers) -> float:
    return float(np.median(values))
