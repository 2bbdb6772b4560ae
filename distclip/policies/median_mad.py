"""A bound on how far a norm may lie from the median of the last ones, measured as they scatter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .history import append, numbers, quantile
from .policy import State
from .validation import NATURAL, NOT_NEGATIVE, take

__all__ = ["MedianMAD"]

_NORMAL = 1.4826
"""What the MAD of normally distributed numbers is multiplied by to be their standard deviation."""


@dataclass(frozen=True, slots=True)
class MedianMAD:
    r"""The median of the last norms times as many of their usual factors of scatter as k says.

    .. math:: bound_t = \min\left(cap, \exp(m + k \max(1.4826 \, d, floor))\right), \quad
        m = \mathrm{median}(\log norm_i), \quad d = \mathrm{median}\,|\log norm_i - m|, \quad t - w \le i < t

    Norms scatter by factors, so it looks at logarithms. A few spikes among them, of any height, hardly move a median:
    the history can be of norms as they were before clipping, so that the rule follows a new level by itself within half
    a window, and has no `seed`. This step's norm is not in it: as the window fills, a spike would
    widen the scatter by which it is judged.

    Args:
        k: how many deviations are let through, ≥ 0.
        window: how many norms it remembers, ≥ 1.
        warmup: so many norms meet the cap only, ≥ 1.
        floor: the least deviation, ≥ 0: norms that hardly scatter may still grow by a factor of exp(k · floor).
        cap: the bound that always holds, in warm-up too, ≥ 0.

    Raises:
        ArgumentError: a number outside of its range.

    Source: the outlier rule of Hampel, "The influence curve and its role in robust estimation", JASA 69, 1974, on
    logarithms.

    >>> MedianMAD(k=6)
    MedianMAD(k=6.0, window=128, warmup=16, floor=0.1, cap=inf)
    """

    k: float = 3.0
    window: int = 128
    warmup: int = 16
    floor: float = 0.1
    cap: float = math.inf

    def __post_init__(self) -> None:
        take(self, k=NOT_NEGATIVE, window=NATURAL, warmup=NATURAL, floor=NOT_NEGATIVE, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """An empty history of logarithms per slot."""
        count = torch.zeros(slots, dtype=torch.int64, device=device)
        return {"logs": numbers(slots, self.window, device=device), "count": count}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound from the norms of the steps before, and the history with this one."""
        logs, count = state["logs"], state["count"]
        middle = quantile(logs, count, 0.5)
        deviation = _NORMAL * quantile((logs - middle.unsqueeze(1)).abs(), count, 0.5)
        bound = (middle + self.k * deviation.clamp(min=self.floor)).exp()
        bound = torch.where(count < self.warmup, math.inf, bound).clamp(max=self.cap)
        return bound, {"logs": append(logs, count, totals.norms.log()), "count": count + 1}
