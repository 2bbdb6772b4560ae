"""A bound that is a percentile of the norms so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .history import append, numbers, quantile
from .policy import State
from .validation import NATURAL, NOT_NEGATIVE, Range, take

__all__ = ["Percentile"]


@dataclass(frozen=True, slots=True)
class Percentile:
    r"""AutoClip: the p-th percentile of the last norms, this one among them.

    .. math:: bound_t = \min(cap, P_p(norm_{t-w+1}, \dots, norm_t))

    The history is of norms as they were before clipping, so that the rule follows wherever they go and has no `seed`:
    there is nothing that it could start anew from but what it remembers. A low p clips nearly every step, which is
    what its authors intend and no sign of being lost.

    Args:
        p: in [0, 100].
        window: how many norms it remembers, ≥ 1; the paper's history is unbounded.
        cap: the bound that always holds, ≥ 0.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation
    networks", MLSP 2020, arXiv 2007.14469, algorithm 1.

    >>> Percentile(p=50)
    Percentile(p=50.0, window=1000, cap=inf)
    """

    p: float = 10.0
    window: int = 1000
    cap: float = math.inf

    def __post_init__(self) -> None:
        take(self, p=Range(0, 100), window=NATURAL, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """An empty history per slot."""
        count = torch.zeros(slots, dtype=torch.int64, device=device)
        return {"history": numbers(slots, self.window, device=device), "count": count}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The percentile, and the history with this norm."""
        history = append(state["history"], state["count"], totals.norms)
        count = state["count"] + 1
        return quantile(history, count, self.p / 100).clamp(max=self.cap), {"history": history, "count": count}
