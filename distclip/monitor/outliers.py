"""Detect steps with unusually large norms, and combine the details that ranks have about them.

The detection depends only on the norms, which are equal on all ranks, so all ranks gather details of the same steps.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .step_buffer import Step

__all__ = ["OutlierDetector", "RankDetails", "merge_details"]

_MIN_NORMS = 5
"""Number of norms that the running median needs."""

_MIN_RATIO = 2.0
"""Minimum ratio of an outlier to the running median. It keeps a calm run free of outliers."""


class OutlierDetector:
    """Detects the steps with the most extreme norms so far.

    Args:
        top: a new outlier must be among this many largest ratios so far. At most this many non-finite steps are
            reported.
        window: number of norms of the running median.

    >>> OutlierDetector(top=1).detect([1.0, 1.1, 0.9, 1.0, 1.0, 5.0, 3.0, 7.0])
    [(5, 5.0), (7, 7.0)]
    """

    def __init__(self, top: int, window: int = 128) -> None:
        self._top = top
        self._recent: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self._top_ratios: list[float] = []
        self._num_nonfinite = 0

    def detect(self, norms: Iterable[float]) -> list[tuple[int, float]]:
        """Find the outliers among the next norms.

        Returns:
            (index, ratio to the running median) of each. The ratio of a non-finite norm is NaN.
        """
        ratios = [(i, self._ratio(norm)) for i, norm in enumerate(norms)]
        return [(i, ratio) for i, ratio in ratios if ratio is not None]

    def _ratio(self, norm: float) -> float | None:
        """Return the ratio of an outlier, or None for any other norm."""
        if not math.isfinite(norm):
            self._num_nonfinite += 1
            return math.nan if self._num_nonfinite <= self._top else None
        median = self._sorted[len(self._sorted) // 2] if len(self._sorted) >= _MIN_NORMS else math.inf
        ratio = norm / median if median > 0 else math.inf
        self._append(norm)
        # The heap holds the `top` largest ratios so far, with the smallest one first.
        full = len(self._top_ratios) == self._top
        if ratio < _MIN_RATIO or not self._top or (full and ratio <= self._top_ratios[0]):
            return None
        (heapq.heapreplace if full else heapq.heappush)(self._top_ratios, ratio)
        return ratio

    def _append(self, norm: float) -> None:
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(norm)
        insort(self._sorted, norm)


@dataclass(frozen=True, slots=True)
class RankDetails:
    """Details of an outlier step that one rank has.

    Args:
        ids: ids of its samples.
        power: power sum of all gradients on the rank, with the loss scale in it.
        largest: name and power sum of its largest gradient; None if it has none. The name is None if the sum is not
            that of a single parameter, because gradients were measured together.
    """

    ids: tuple[Any, ...]
    power: float
    largest: tuple[str | None, float] | None

    @classmethod
    def of(cls, step: Step, parameters: Collection[str]) -> RankDetails:
        """Read the details of a step on this rank. Host syncs: one or two per gradient.

        Args:
            step: step to describe.
            parameters: names of this rank's parameters.
        """
        try:
            ids = tuple(step.read_ids())
        except Exception:
            # A noted tensor was freed. The other ranks gather details of this step, so this rank must too.
            ids = ()
        largest: tuple[str | None, float] | None = step.largest_gradient()
        if largest is not None and largest[0] not in parameters:
            largest = None, largest[1]
        return cls(ids, step.local_power(), largest)


def merge_details(by_rank: Sequence[RankDetails], ranks: Sequence[int], power_sum: Tensor) -> dict[str, Any]:
    """Merge the details of all ranks into fields of a line.

    Args:
        by_rank: details of each rank.
        ranks: numbers of the ranks.
        power_sum: 0-d, of the whole gradient.

    Returns:
        The fields `ids` and `worst`, as far as they are known.

    >>> import torch
    >>> one, two = RankDetails((7,), 1.0, ("weight", 1.0)), RankDetails((7, 8), 3.0, ("bias", 2.0))
    >>> merge_details([one, two], [4, 6], torch.tensor(4.0))
    {'ids': [7, 8], 'worst': {'rank': 6, 'tensor': 'bias', 'share': 0.5}}
    """
    fields: dict[str, Any] = {}
    if ids := list(dict.fromkeys(sample for details in by_rank for sample in details.ids)):
        fields["ids"] = ids
    if not math.isfinite(total := float(power_sum)):
        return fields
    worst = max(range(len(by_rank)), key=lambda i: by_rank[i].power)
    # Ranks with replicas of the same gradients do not differ.
    power = by_rank[worst].power
    ranks_differ = power - min(details.power for details in by_rank) > 1e-9 * power
    if (largest := by_rank[worst].largest) is not None:
        name, tensor_power = largest
        fields["worst"] = {
            "rank": ranks[worst] if ranks_differ else None,
            "tensor": name,
            "share": tensor_power / total if total else None,
        }
    return fields
