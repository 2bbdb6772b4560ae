"""Bound the z-score of a norm among the recent norms: ZClip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import Per
from .history import zeros
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, convert_fields, is_count, is_size

__all__ = ["Statistics", "ZScore", "zclip"]

Statistics: TypeAlias = Literal["capped", "published"]
"""Norms from which `zclip` computes the mean and the deviation: with the cap applied, or without it."""


def zclip(
    z: float = 2.5,
    decay: float = 0.97,
    warmup: int = 25,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
    restart_after: int = 128,
    statistics: Statistics = "capped",
) -> NormPolicy:
    r"""Clip norms with a z-score above `z`. The larger the score, the lower the bound (ZClip).

    .. math:: bound_t = \min\left(cap, \mu + \frac{z^2}{z_t} \sigma\right) \text{ if }
        z_t = \frac{norm_t - \mu}{\sigma + 10^{-6} \mu} > z \text{ else } cap

    μ and σ are the running mean and standard deviation of the clipped norms. The published rule (`restart_after=0`,
    `statistics="published"`, with cap=1.0) never follows norms that rise for good by a few times their scatter.

    Args:
        z: largest z-score that is not clipped, > 0.
        decay: of the mean and the variance, in [0, 1).
        warmup: number of norms at the start to which only the cap applies, ≥ 1.
        cap: hard upper bound, ≥ 0, which also applies during warm-up: a max_norm of the usual size, such as 1.0.
            Without it, norms that explode during warm-up are not clipped. The rule then warns, and starts from the
            norms before the explosion.
        norm_type: p of the norm.
        per: granularity (see `NormPolicy`).
        restart_after: number of steps after which the rule restarts from the norms before clipping if it has clipped
            more than half of them. 0 for never.
        statistics: norms from which μ and σ are computed. "capped": norms as they are applied, clipped by the rule and
            by the cap, so that the rule stays active under a cap that clips every step. "published": norms clipped by
            the rule alone, and unclipped norms during warm-up, as in the authors' code. Then the rule has no effect if
            μ is above the cap, and bounds differ by up to 10 % where the cap clips often. Without a cap, both choices
            are equal.

    Raises:
        ArgumentError: a number outside of its range, or other statistics.

    Source: Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025,
    arXiv 2504.02507, algorithm 1 with reciprocal clipping. There 1e-6 is added to σ. Here it is relative to μ, so that
    the rule is the same at any scale of the norms.

    >>> zclip(3.0).threshold
    ZScore(z=3.0, decay=0.97, warmup=25, eps=1e-06, cap=inf, statistics='capped')
    """
    threshold = ZScore(z, decay, warmup, cap=cap, statistics=statistics)
    return NormPolicy(threshold, norm_type, per, restart_after=restart_after)


@dataclass(frozen=True, slots=True)
class ZScore(Rule):
    r"""Threshold of `zclip`.

    .. math::
        z_t &= \frac{norm_t - \mu}{\sigma + \varepsilon \mu}, \qquad
        bound_t = \mu + \frac{z^2}{z_t} \sigma \text{ if } z_t > z \text{ else } \infty \\
        x_t &= \min(norm_t, bound_t, c), \quad \mu' = a \mu + (1 - a) x_t,
        \quad \sigma'^2 = a \sigma^2 + (1 - a) (x_t - \mu')^2

    Here a is the decay, and c is the cap, or ∞ with statistics="published". μ and σ² start from the mean and the
    population variance of the first `warmup` norms.

    Args:
        z, decay, warmup, cap, statistics: see `zclip`.
        eps: ε, > 0. It is added to σ, relative to μ, so that the divisor of a distance is never 0.

    Raises:
        ArgumentError: a number outside of its range, or other statistics.

    >>> ZScore(z=3)
    ZScore(z=3.0, decay=0.97, warmup=25, eps=1e-06, cap=inf, statistics='capped')
    """

    can_restart = True

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    eps: float = 1e-6
    cap: float = math.inf
    statistics: Statistics = "capped"

    def __post_init__(self) -> None:
        if self.statistics not in get_args(Statistics):
            raise ArgumentError(
                f"statistics={self.statistics!r:.60}: unknown. Use one of {', '.join(get_args(Statistics))}."
            )
        convert_fields(self, z=POSITIVE, decay=FRACTION, warmup=NATURAL, eps=POSITIVE, cap=NOT_NEGATIVE)

    @property
    def unbounded_steps(self) -> int:
        """Number of norms in the warm-up."""
        return self.warmup

    def init(self, slots: int, device: torch.device) -> State:
        """Return mean, variance and number of the norms so far, all 0."""
        zero = zeros(slots, device=device)
        return {"mean": zero, "var": zero.clone(), "count": zero.long()}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound from the statistics of the steps before, and the statistics with the clipped norm."""
        norms, mean, var, count = totals.norms, state["mean"], state["var"], state["count"]
        in_warmup = count < self.warmup
        deviation = var.sqrt()
        score = (norms - mean) / (deviation + self.eps * mean)
        unclipped = in_warmup | ~(score > self.z)
        bound = torch.where(unclipped, math.inf, mean + self.z * deviation / (score / self.z))
        clipped = torch.minimum(norms, bound.clamp(max=self._limit))
        # All norms of the warm-up have equal weights: Welford's running mean and variance, which need no buffer.
        weight = torch.where(in_warmup, 1 / (count + 1).to(norms.dtype), 1 - self.decay)
        new_mean = mean + weight * (clipped - mean)
        square = (clipped - new_mean) * (clipped - torch.where(in_warmup, mean, new_mean))
        return bound, {"mean": new_mean, "var": (1 - weight) * var + weight * square, "count": count + 1}

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        mean, var, count = state["mean"], state["var"], state["count"]
        # All norms are above 0, so a mean of 0 is valid only before the first norm, or with a cap of 0.
        started = (count == 0) | (mean > 0) | (self.cap == 0)
        return {"mean": is_size(mean) & started, "var": is_size(var), "count": is_count(count)}

    def restart(self, norms: Tensor, state: State) -> State:
        """Return the mean and variance of the last norms before clipping, as after a warm-up with these norms."""
        var, mean = torch.var_mean(norms.clamp(max=self._limit), dim=1, correction=0)
        return {"mean": mean, "var": var, "count": state["count"].clamp(min=self.warmup)}

    @property
    def _limit(self) -> float:
        """Largest norm that the mean and the variance include."""
        return self.cap if self.statistics == "capped" else math.inf
