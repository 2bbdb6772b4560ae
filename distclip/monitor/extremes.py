"""Which steps stand out so far, by how far their norm lies above what is usual.

Found from the norms alone, which all ranks have alike, so that all agree of which steps to tell each other more.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

__all__ = ["Extremes"]

_ENOUGH = 16
"""Norms before which nothing is usual yet."""

_FACTOR = 2.0
"""What is below so many medians is no extreme, however calm the run."""


class Extremes:
    """Keeps the score of a run.

    Args:
        top: how many steps stand out at most at a time; and how many that are not finite are told of.
        window: how many norms make the running median.

    >>> Extremes(top=1).among([1.0] * 16 + [5.0, 3.0, 7.0])
    [(16, 5.0), (18, 7.0)]
    """

    def __init__(self, top: int, window: int = 128) -> None:
        self._top = top
        self._recent: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self._best: list[float] = []
        self._nonfinite = 0

    def among(self, norms: Iterable[float]) -> list[tuple[int, float]]:
        """Those of the next norms that are among the most extreme so far: position, and how many running medians.

        NaN stands for the ratio of one that is not finite.
        """
        ratios = [(i, self._ratio(norm)) for i, norm in enumerate(norms)]
        return [(i, ratio) for i, ratio in ratios if ratio is not None]

    def _ratio(self, norm: float) -> float | None:
        if not math.isfinite(norm):
            self._nonfinite += 1
            return math.nan if self._nonfinite <= self._top else None
        usual = self._sorted[len(self._sorted) // 2] if len(self._sorted) >= _ENOUGH else math.inf
        ratio = norm / usual if usual > 0 else math.inf
        self._enter(norm)
        if ratio < _FACTOR or not self._top or (len(self._best) == self._top and ratio <= self._best[0]):
            return None
        (heapq.heappush if len(self._best) < self._top else heapq.heapreplace)(self._best, ratio)
        return ratio

    def _enter(self, norm: float) -> None:
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(norm)
        insort(self._sorted, norm)
