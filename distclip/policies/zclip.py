"""A bound on how many standard deviations a norm may lie above the mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .history import numbers
from .policy import State
from .validation import FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, take

__all__ = ["ZScore"]


@dataclass(frozen=True, slots=True)
class ZScore:
    r"""ZClip: a norm whose z-score is beyond the threshold is cut the deeper the farther out it is.

    .. math::
        z_t &= \frac{norm_t - \mu}{\sigma + \varepsilon}, \qquad
        bound_t = \mu + \frac{z^2}{z_t} \sigma \text{ if } z_t > z \text{ else } \infty \\
        x_t &= \min(norm_t, bound_t, cap), \quad \mu' = a \mu + (1 - a) x_t,
        \quad \sigma'^2 = a \sigma^2 + (1 - a) (x_t - \mu')^2

    The first `warmup` norms meet the cap only; their mean and population variance are what μ and σ² start from.

    Args:
        z: the z-score from which on it clips, > 0.
        decay: a, in [0, 1).
        warmup: ≥ 1.
        eps: ε, > 0.
        cap: the bound that always holds, in warm-up too, ≥ 0.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025,
    arXiv 2504.02507, algorithm 1 with reciprocal clipping.

    >>> ZScore(z=3)
    ZScore(z=3.0, decay=0.97, warmup=25, eps=1e-06, cap=inf)
    """

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    eps: float = 1e-6
    cap: float = math.inf

    def __post_init__(self) -> None:
        take(self, z=POSITIVE, decay=FRACTION, warmup=NATURAL, eps=POSITIVE, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Mean, variance and number of the norms so far."""
        nothing = numbers(slots, device=device)
        return {"mean": nothing, "var": nothing.clone(), "count": nothing.long()}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound from the statistics of the steps before, and the statistics with the clipped norm."""
        norms, mean, var, count = totals.norms, state["mean"], state["var"], state["count"]
        warming = count < self.warmup
        deviation = var.sqrt()
        score = (norms - mean) / (deviation + self.eps)
        free = warming | ~(score > self.z)
        bound = torch.where(free, math.inf, mean + self.z * deviation / (score / self.z)).clamp(max=self.cap)
        used = torch.minimum(norms, bound)
        # Every norm of the warm-up weighs the same: a running mean and variance (Welford), with no buffer.
        weight = torch.where(warming, 1 / (count + 1).to(norms.dtype), 1 - self.decay)
        moved = mean + weight * (used - mean)
        square = (used - moved) * (used - torch.where(warming, mean, moved))
        return bound, {"mean": moved, "var": (1 - weight) * var + weight * square, "count": count + 1}

    def seed(self, norms: Tensor, state: State) -> State:
        """Mean and variance of the last norms before clipping, as after a warm-up over them."""
        var, mean = torch.var_mean(norms.clamp(max=self.cap), dim=1, correction=0)
        return {"mean": mean, "var": var, "count": state["count"].clamp(min=self.warmup)}
