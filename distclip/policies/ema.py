"""A bound that is a multiple of the running mean of the norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .history import numbers
from .policy import State
from .validation import FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, take

__all__ = ["EMA"]


@dataclass(frozen=True, slots=True)
class EMA:
    r"""A norm far above a slow average of the norms is cut to just above a fast one.

    .. math::
        bound_t &= target \cdot \hat f \text{ if } norm_t > ratio \cdot \hat s \text{ else } \infty \\
        x_t &= \min(norm_t, bound_t, cap), \quad s' = b_s s + (1 - b_s) x_t, \quad \hat s = s / (1 - b_s^t)

    and likewise f. What enters the averages is the norm after clipping: a burst of large ones does not blind the rule.

    Args:
        ratio: how far above the slow average a norm is let through, > 0.
        target: to how far above the fast average it is cut otherwise, > 0.
        slow: b of the slow average, in [0, 1).
        fast: b of the fast one, in [0, 1).
        warmup: so many norms meet the cap only, ≥ 1.
        cap: the bound that always holds, in warm-up too, ≥ 0.

    Raises:
        ArgumentError: a number outside of its range.

    Source: the EmaGradClip of PDE-Transformer (arXiv 2505.24717), with the bias correction of Adam (arXiv 1412.6980,
    section 3), without which averages that start at 0 clip every early step, and fed with the clipped norm.

    >>> EMA(ratio=3)
    EMA(ratio=3.0, target=1.1, slow=0.99, fast=0.9, warmup=20, cap=inf)
    """

    ratio: float = 2.0
    target: float = 1.1
    slow: float = 0.99
    fast: float = 0.9
    warmup: int = 20
    cap: float = math.inf

    def __post_init__(self) -> None:
        take(self, ratio=POSITIVE, target=POSITIVE, slow=FRACTION, fast=FRACTION, warmup=NATURAL, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Both averages, without their bias, and the number of the norms so far."""
        nothing = numbers(slots, device=device)
        return {"slow": nothing, "fast": nothing.clone(), "count": nothing.long()}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound from the averages of the steps before, and the averages with the clipped norm."""
        norms, count = totals.norms, state["count"]
        free = (count < self.warmup) | ~(norms > self.ratio * state["slow"])
        bound = torch.where(free, math.inf, self.target * state["fast"]).clamp(max=self.cap)
        used = torch.minimum(norms, bound)
        moved = {"count": count + 1}
        for name, decay in (("slow", self.slow), ("fast", self.fast)):
            # s / (1 - b^t) kept itself: its step towards x has the weight (1 - b) / (1 - b^t).
            weight = (1 - decay) / (1 - decay ** (count + 1).to(norms.dtype))
            moved[name] = state[name] + weight * (used - state[name])
        return bound, moved

    def seed(self, norms: Tensor, state: State) -> State:
        """Both averages at the mean of the last norms before clipping, which weighs as much as so many norms do."""
        mean = norms.clamp(max=self.cap).mean(1)
        return {"slow": mean, "fast": mean.clone(), "count": state["count"].clamp(min=max(self.warmup, norms.shape[1]))}
