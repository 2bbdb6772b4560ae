"""Bound norms by the mean and standard deviation of the last norms: the rule of OLMo's SkipStep optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .history import append, is_filled, zeros
from .policy import Rule, State
from .validation import NOT_NEGATIVE, Range, convert_fields, is_count, is_size

__all__ = ["MeanStd"]


@dataclass(frozen=True, slots=True)
class MeanStd(Rule):
    r"""Threshold at `sigma` standard deviations above the mean of the last norms.

    .. math:: bound_t = \mu + k s, \quad t - w \le i < t

    Here μ is the mean, and s the sample standard deviation, of the last w norms before clipping. Norms of skipped steps
    count, as in the source. `distclip.recipes.olmo3` skips steps beyond the bound.

    Args:
        sigma: k, ≥ 0.
        window: w, ≥ 2.
        warmup: number of norms at the start to which only the cap applies, ≥ 2.
        cap: hard upper bound, ≥ 0, which also applies during warm-up.

    Raises:
        ArgumentError: a number outside of its range.

    Source: the SkipStepOptimizer of OLMo-core, `get_step_factor`, for norms. The source applies the same rule to
    losses, which a policy does not see.

    >>> MeanStd(cap=1.0)
    MeanStd(sigma=6.0, window=128, warmup=63, cap=1.0)
    """

    sigma: float = 6.0
    window: int = 128
    warmup: int = 63
    cap: float = math.inf

    def __post_init__(self) -> None:
        several = Range(2, whole=True)
        convert_fields(self, sigma=NOT_NEGATIVE, window=several, warmup=several, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty history."""
        count = torch.zeros(slots, dtype=torch.int64, device=device)
        return {"last_norms": zeros(slots, self.window, device=device), "count": count}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound from the norms of the steps before, and the history with the norm of this step."""
        norms, history, count = totals.norms, state["last_norms"], state["count"]
        filled = is_filled(history, count)
        num = filled.sum(1).to(norms.dtype)
        mean = (history * filled).sum(1) / num
        squares = ((history - mean.unsqueeze(1)) * filled).square().sum(1)
        bound = mean + self.sigma * (squares / (num - 1)).sqrt()
        bound = torch.where(count < self.warmup, math.inf, bound)
        return bound, {"last_norms": append(history, count, norms), "count": count + 1}

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        return {"last_norms": is_size(state["last_norms"]), "count": is_count(state["count"])}
