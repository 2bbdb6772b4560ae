"""Bound norms by a percentile of the recent ones: AutoClip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from ..norms.spec import Per
from .history import append, is_filled, quantile, zeros
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import NATURAL, NOT_NEGATIVE, Range, convert_fields, is_count, is_size

__all__ = ["Percentile", "autoclip"]


def autoclip(
    percentile: float = 10.0,
    window: int = 1000,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
) -> NormPolicy:
    r"""Clip to a percentile of the last norms, the current one included (AutoClip).

    .. math:: bound_t = \min(cap, P_p(norm_{t-w+1}, \dots, norm_t))

    A low percentile clips nearly every step, 90 % of them at the default. It acts more like normalization than like
    clipping, as its authors intend.

    Args:
        percentile: p, in [0, 100].
        window: w, number of norms in the history, ≥ 1. The paper's history is unbounded.
        cap: hard upper bound, ≥ 0. Without it, the rule learns from bad first batches as from any others.
        norm_type: p of the norm.
        per: granularity (see `NormPolicy`).

    Raises:
        ArgumentError: a number outside of its range.

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation
    networks", MLSP 2020, arXiv 2007.14469, algorithm 1.

    >>> autoclip(25).threshold
    Percentile(p=25.0, window=1000, cap=inf)
    """
    return NormPolicy(Percentile(percentile, window, cap), norm_type, per)


@dataclass(frozen=True, slots=True)
class Percentile(Rule):
    """Threshold of `autoclip`.

    The history contains norms before clipping, so the rule follows any change of the norms. It does not restart,
    because a restart could only begin from the norms that its history already contains.

    Args:
        p: `percentile` of `autoclip`.
        window, cap: see `autoclip`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> Percentile(p=50)
    Percentile(p=50.0, window=1000, cap=inf)
    """

    p: float = 10.0
    window: int = 1000
    cap: float = math.inf

    def __post_init__(self) -> None:
        convert_fields(self, p=Range(0, 100), window=NATURAL, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty history per slot."""
        count = torch.zeros(slots, dtype=torch.int64, device=device)
        return {"history": zeros(slots, self.window, device=device), "count": count}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the percentile of the history with the norm of this step, and that history."""
        history = append(state["history"], state["count"], totals.norms)
        count = state["count"] + 1
        return quantile(history, count, self.p / 100), {"history": history, "count": count}

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        history, count = state["history"], state["count"]
        # A norm of 0 is never appended.
        return {"history": is_size(history) & ((history > 0) | ~is_filled(history, count)), "count": is_count(count)}
