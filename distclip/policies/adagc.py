"""Bound the growth of norms over the running mean of the clipped norms: AdaGC."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from ..norms.spec import Per
from .history import zeros
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, convert_fields, is_count, is_size

__all__ = ["AdaGC", "adagc"]


def adagc(
    ratio: float = 1.04,
    decay: float = 0.99,
    warmup: int = 100,
    warmup_norm: float = 1.0,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "tensor",
    restart_after: int = 0,
) -> NormPolicy:
    r"""Clip each parameter's gradient to a few percent above its own running mean (AdaGC).

    .. math:: bound_i = \min(cap, \lambda \gamma_i), \quad
        \gamma_i' = \beta \gamma_i + (1 - \beta) \min(norm_i, bound_i)

    During warm-up, one bound applies to the norm of the whole gradient, and γ becomes the smallest clipped norm. If
    norms scatter by a quarter, the rule clips most steps, because a bound slightly above a mean of clipped norms is
    below many healthy norms. `restart_after` would mistake such a rule for a stuck one, so it is off by default.

    Args:
        ratio: λ, > 0.
        decay: β, in [0, 1).
        warmup: number of warm-up steps, ≥ 1. Steps are counted per slot, so that a slot whose first gradient comes
            later (unfreezing) has a separate warm-up.
        warmup_norm: bound on the norm of all slots together during warm-up, > 0.
        cap: hard upper bound, ≥ 0, which also applies during warm-up.
        norm_type: p of the norm.
        per: granularity (see `NormPolicy`).
        restart_after: number of steps after which the rule restarts from the norms before clipping if it has clipped
            more than half of them. 0 for never, like the published rule.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Wang et al., "AdaGC: improving training stability for large language model pretraining", 2025,
    arXiv 2502.11034, algorithm 1. λ and β are those of its authors' published code.

    >>> adagc(1.05).threshold.ratio
    1.05
    """
    return NormPolicy(AdaGC(ratio, decay, warmup, warmup_norm, cap), norm_type, per, restart_after=restart_after)


@dataclass(frozen=True, slots=True)
class AdaGC(Rule):
    r"""Threshold of `adagc`.

    .. math::
        h_t &= \min\left(1, \frac{c}{norm^{all}_t}\right),
        \quad \gamma' = \min(\gamma, h_t \, norm_t) && \text{in warm-up} \\
        h_t &= \min\left(1, \frac{\lambda \gamma}{norm_t}\right),
        \quad \gamma' = \beta \gamma + (1 - \beta) h_t \, norm_t && \text{after it}

    Here c is the `warmup_norm`.

    Args:
        ratio, decay, warmup, warmup_norm, cap: see `adagc`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> AdaGC(ratio=1.05)
    AdaGC(ratio=1.05, decay=0.99, warmup=100, warmup_norm=1.0, cap=inf)
    """

    can_restart = True

    ratio: float = 1.04
    decay: float = 0.99
    warmup: int = 100
    warmup_norm: float = 1.0
    cap: float = math.inf

    def __post_init__(self) -> None:
        convert_fields(self, ratio=POSITIVE, decay=FRACTION, warmup=NATURAL)
        convert_fields(self, warmup_norm=POSITIVE, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Return γ, inf until a slot has its first norm, and the number of the norms so far."""
        gamma = zeros(slots, device=device) + math.inf
        return {"gamma": gamma, "count": torch.zeros(slots, dtype=torch.int64, device=device)}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound from the mean of the steps before, and the mean with the clipped norm."""
        norms, gamma, in_warmup = totals.norms, state["gamma"], state["count"] < self.warmup
        # The policy divides a slot's bound by its norm, so this gives every slot the coefficient of the whole model.
        model_coef = (self.warmup_norm / totals.norm).clamp(max=1)
        bound = torch.where(in_warmup, model_coef * norms, self.ratio * gamma)
        clipped = torch.minimum(norms, bound.clamp(max=self.cap))
        mean = self.decay * gamma + (1 - self.decay) * clipped
        return bound, {
            "gamma": torch.where(in_warmup, torch.minimum(gamma, clipped), mean),
            "count": state["count"] + 1,
        }

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        gamma, count = state["gamma"], state["count"]
        # All norms are above 0, so a mean of 0 is valid only with a cap of 0.
        started = is_size(gamma) & ((gamma > 0) | (self.cap == 0))
        return {"gamma": torch.where(count == 0, gamma == math.inf, started), "count": is_count(count)}

    def restart(self, norms: Tensor, state: State) -> State:
        """Return γ as the mean of the last norms before clipping, if none of them is from the warm-up."""
        # During warm-up the bound of the whole model clips, and the rule must start from the resulting minimum.
        after_warmup = state["count"] >= self.warmup + norms.shape[1]
        return state | {"gamma": torch.where(after_warmup, norms.clamp(max=self.cap).mean(1), state["gamma"])}
