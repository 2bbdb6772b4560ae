"""Bound norms relative to their running means: EmaGradClip."""

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

__all__ = ["EMA", "ema"]


def ema(
    ratio: float = 2.0,
    target: float = 1.1,
    slow: float = 0.99,
    fast: float = 0.9,
    warmup: int = 20,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
    restart_after: int = 128,
) -> NormPolicy:
    r"""Clip norms far above a slow running mean to just above a fast running mean.

    .. math:: bound_t = \min(cap, target \cdot fast) \text{ if } norm_t > ratio \cdot slow \text{ else } cap

    Here `slow` and `fast` are bias-corrected running means of the clipped norms, so that a burst of large norms does
    not raise the bound.

    Args:
        ratio: largest ratio of a norm to the slow mean that is not clipped, > 0.
        target: ratio of the bound to the fast mean, > 0.
        slow: decay of the slow mean, in [0, 1).
        fast: decay of the fast mean, in [0, 1).
        warmup: number of norms at the start to which only the cap applies, ≥ 1.
        cap: hard upper bound, ≥ 0, which also applies during warm-up: a max_norm of the usual size, such as 1.0.
            Without it, norms that explode during warm-up are not clipped. The rule then warns, and starts from the
            norms before the explosion.
        norm_type: p of the norm.
        per: granularity (see `NormPolicy`).
        restart_after: number of steps after which the rule restarts from the norms before clipping if it has clipped
            more than half of them. 0 for never.

    Raises:
        ArgumentError: a number outside of its range.

    Source: the EmaGradClip of PDE-Transformer (arXiv 2505.24717), with means of the clipped norm instead, and with the
    bias correction of Adam (arXiv 1412.6980, section 3), without which means that start at 0 clip every early step.

    >>> ema(3.0).threshold
    EMA(ratio=3.0, target=1.1, slow=0.99, fast=0.9, warmup=20, cap=inf)
    """
    return NormPolicy(EMA(ratio, target, slow, fast, warmup, cap), norm_type, per, restart_after=restart_after)


@dataclass(frozen=True, slots=True)
class EMA(Rule):
    r"""Threshold of `ema`.

    .. math::
        bound_t &= target \cdot \hat f \text{ if } norm_t > ratio \cdot \hat s \text{ else } \infty \\
        x_t &= \min(norm_t, bound_t, cap), \quad s' = b_s s + (1 - b_s) x_t, \quad \hat s = s / (1 - b_s^t)

    Here s is the slow mean. The fast mean f is computed in the same way.

    Args:
        ratio, target, slow, fast, warmup, cap: see `ema`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> EMA(ratio=3)
    EMA(ratio=3.0, target=1.1, slow=0.99, fast=0.9, warmup=20, cap=inf)
    """

    can_restart = True

    ratio: float = 2.0
    target: float = 1.1
    slow: float = 0.99
    fast: float = 0.9
    warmup: int = 20
    cap: float = math.inf

    def __post_init__(self) -> None:
        convert_fields(self, ratio=POSITIVE, target=POSITIVE, slow=FRACTION, fast=FRACTION)
        convert_fields(self, warmup=NATURAL, cap=NOT_NEGATIVE)

    @property
    def unbounded_steps(self) -> int:
        """Number of norms in the warm-up."""
        return self.warmup

    def init(self, slots: int, device: torch.device) -> State:
        """Return both bias-corrected means and the number of the norms so far, all 0."""
        zero = zeros(slots, device=device)
        return {"slow": zero, "fast": zero.clone(), "count": zero.long()}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound from the means of the steps before, and the means with the clipped norm."""
        norms, count = totals.norms, state["count"]
        unclipped = (count < self.warmup) | ~(norms > self.ratio * state["slow"])
        bound = torch.where(unclipped, math.inf, self.target * state["fast"])
        clipped = torch.minimum(norms, bound.clamp(max=self.cap))
        new_state = {"count": count + 1}
        for name, decay in (("slow", self.slow), ("fast", self.fast)):
            # The state is the corrected mean s / (1 - b^t), so x enters with the weight (1 - b) / (1 - b^t).
            weight = (1 - decay) / (1 - decay ** (count + 1).to(norms.dtype))
            new_state[name] = state[name] + weight * (clipped - state[name])
        return bound, new_state

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        count = state["count"]
        means = {key: state[key] for key in ("slow", "fast")}
        # All norms are above 0, so a mean of 0 is valid only before the first norm, or with a cap of 0.
        masks = {key: is_size(mean) & ((count == 0) | (mean > 0) | (self.cap == 0)) for key, mean in means.items()}
        return masks | {"count": is_count(count)}

    def restart(self, norms: Tensor, state: State) -> State:
        """Return both means as the mean of the last norms before clipping."""
        # The mean gets the weight of that many norms.
        mean = norms.clamp(max=self.cap).mean(1)
        count = state["count"].clamp(min=max(self.warmup, norms.shape[1]))
        return {"slow": mean, "fast": mean.clone(), "count": count}
