"""A bound that lets a norm grow only so far above the running mean of the clipped ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .history import numbers
from .policy import State
from .validation import FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, take

__all__ = ["AdaGC"]


@dataclass(frozen=True, slots=True)
class AdaGC:
    r"""Every slot is clipped to a little above its own average, after a warm-up under one fixed global bound.

    .. math::
        h_t &= \min\left(1, \frac{c}{norm^{all}_t + \varepsilon}\right),
        \quad \gamma' = \min(\gamma, h_t \, norm_t) && \text{in warm-up} \\
        h_t &= \min\left(1, \frac{\lambda \gamma}{norm_t + \varepsilon}\right),
        \quad \gamma' = \beta \gamma + (1 - \beta) h_t \, norm_t && \text{after it}

    Steps are counted per slot: one whose gradients come later (unfreezing) has a warm-up of its own. A bound just above
    an average of clipped norms is below many healthy ones: see `adagc` for how many.

    Args:
        ratio: λ, > 0.
        decay: β, in [0, 1).
        warmup: ≥ 1.
        warmup_norm: c, the bound on the norm of all slots together in warm-up, > 0.
        eps: ε, that of the policy around it, ≥ 0.
        cap: the bound that always holds, in warm-up too, ≥ 0.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Wang et al., "AdaGC: improving training stability for large language model pretraining", 2025,
    arXiv 2502.11034, algorithm 1; λ and β are those of its authors' published code.

    >>> AdaGC(ratio=1.05)
    AdaGC(ratio=1.05, decay=0.99, warmup=100, warmup_norm=1.0, eps=1e-06, cap=inf)
    """

    ratio: float = 1.04
    decay: float = 0.99
    warmup: int = 100
    warmup_norm: float = 1.0
    eps: float = 1e-6
    cap: float = math.inf

    def __post_init__(self) -> None:
        take(self, ratio=POSITIVE, decay=FRACTION, warmup=NATURAL)
        take(self, warmup_norm=POSITIVE, eps=NOT_NEGATIVE, cap=NOT_NEGATIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """γ, infinite until a slot has its first norm, and the number of the norms so far."""
        gamma = numbers(slots, device=device, fill=math.inf)
        return {"gamma": gamma, "count": torch.zeros(slots, dtype=torch.int64, device=device)}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound from the average of the steps before, and the average with the clipped norm."""
        gamma, warming = state["gamma"], state["count"] < self.warmup
        length = totals.norms + self.eps
        together = (self.warmup_norm / (totals.norm + self.eps)).clamp(max=1)
        # Written so that the policy, which divides by `length`, comes out at the coefficient of all.
        bound = torch.where(warming, together * length, self.ratio * gamma).clamp(max=self.cap)
        clipped = (bound / length).clamp(max=1) * totals.norms
        average = self.decay * gamma + (1 - self.decay) * clipped
        return bound, {
            "gamma": torch.where(warming, torch.minimum(gamma, clipped), average),
            "count": state["count"] + 1,
        }

    def seed(self, norms: Tensor, state: State) -> State:
        """γ at the mean of the last norms before clipping, once none of them is from the warm-up.

        There it was the global bound that clipped, and the minimum that came of it is where the rule is to start.
        """
        known = state["count"] >= self.warmup + norms.shape[1]
        return state | {"gamma": torch.where(known, norms.clamp(max=self.cap).mean(1), state["gamma"])}
