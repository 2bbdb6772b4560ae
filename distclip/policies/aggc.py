"""Keep norms in a band around their running mean: AGGC, which also scales small norms up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import Per
from .history import zeros
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import FRACTION, NATURAL, NOT_NEGATIVE, POSITIVE, Range, convert_fields, is_count, is_size, to_float

__all__ = ["Band", "aggc"]

_FACTOR = Range(1, exclude=(math.inf,))
_STEPS = Range(0, whole=True)


def aggc(
    low: float = 0.5,
    high: float = 2.0,
    groups: Mapping[str, str] | None = None,
    decay: float = 0.98,
    warmup: int = 20,
    late_low: float | None = None,
    late_high: float | None = None,
    switch: int = 0,
    transition: int = 0,
    min_norm: float = 0.0,
    max_coef: float = 10.0,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "tensor",
    restart_after: int = 128,
) -> NormPolicy:
    r"""Keep the norm of each group in a band around its running mean, and scale small norms up (AGGC).

    .. math::
        L = \max(min\_norm, \alpha_{low}(t) \, S), \quad U = \min(cap, \alpha_{high}(t) \, S), \quad
        coef = \begin{cases}
            U / norm & norm > U \\ \min(max\_coef, L / norm) & norm < L \\ 1 & \text{else} \end{cases}

    S is the bias-corrected running mean of the norms after scaling. A norm of 0 stays 0. A floor above U has no effect.

    Args:
        low: α_low, lower end of the band as a multiple of S, ≥ 0. 0 scales nothing up.
        high: α_high, upper end of the band as a multiple of S, > 0.
        groups: functional groups, {name: regular expression that is searched in parameter names}, as in
            {"query": "q_proj", "value": "v_proj"}. They imply per="group". None to form groups by `per`.
        decay: β of the mean, in [0, 1).
        warmup: number of norms at the start to which only the cap applies, ≥ 1. Steps are counted per group.
        late_low, late_high: multiples after the transition. None keeps `low` or `high`.
        switch: number of steps before the transition, ≥ 0.
        transition: number of steps over which the multiples change linearly, ≥ 0.
        min_norm: lower limit of the floor, ≥ 0.
        max_coef: largest factor by which a norm is scaled up, ≥ 1.
        cap: hard upper bound, ≥ 0, which also applies during warm-up.
        norm_type: p of the norm.
        per: granularity (see `NormPolicy`), if there are no `groups`.
        restart_after: number of steps after which the rule restarts from the norms before clipping if it has scaled
            more than half of them down. 0 for never.

    Raises:
        ArgumentError: a number outside of its range, or an invalid regular expression.

    Source: Li et al., "AGGC: adaptive group gradient clipping for stabilizing large language model training", 2026,
    arXiv 2601.11864, and its published code (`PerModuleGradClipper`), which averages the norms after clipping and gives
    the schedule as a fraction of all steps. β is the default of that code. The published runs use 0.95 and 0.98 as
    lower multiples, 0.6 to 0.999 as upper multiples, and factors between 0.9 and 1.1, because their mean starts at 0.
    Here it starts from the first norms, so that the band can contain 1. The default multiples and the default
    `max_coef` are ours.

    >>> policy = aggc(0.5, 2.0, {"query": "q_proj", "value": "v_proj"}, cap=1.0)
    >>> policy.per, policy.threshold.max_coef
    ('group', 10.0)
    """
    band = Band(low, high, decay, warmup, late_low, late_high, switch, transition, min_norm, max_coef, cap)
    if groups:
        return NormPolicy(band, norm_type, "group", groups, restart_after=restart_after)
    return NormPolicy(band, norm_type, per, restart_after=restart_after)


@dataclass(frozen=True, slots=True)
class Band(Rule):
    r"""Threshold of `aggc`, with a floor.

    .. math::
        U_t = \alpha_{high}(t) \, S, \quad L_t = \max(min\_norm, \alpha_{low}(t) \, S), \quad
        x_t = \min(\max(norm_t, \min(L_t, max\_coef \cdot norm_t)), U_t, cap), \quad S' = \beta S + (1 - \beta) x_t

    Args:
        low, high, decay, warmup, late_low, late_high, switch, transition, min_norm, max_coef, cap: see `aggc`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> Band(low=0.9).low
    0.9
    """

    can_restart = True

    low: float = 0.5
    high: float = 2.0
    decay: float = 0.98
    warmup: int = 20
    late_low: float | None = None
    late_high: float | None = None
    switch: int = 0
    transition: int = 0
    min_norm: float = 0.0
    max_coef: float = 10.0
    cap: float = math.inf

    def __post_init__(self) -> None:
        convert_fields(self, low=NOT_NEGATIVE, high=POSITIVE, decay=FRACTION, warmup=NATURAL, switch=_STEPS)
        convert_fields(self, transition=_STEPS, min_norm=NOT_NEGATIVE, max_coef=_FACTOR, cap=NOT_NEGATIVE)
        for name, late, allowed in (("low", self.late_low, NOT_NEGATIVE), ("high", self.late_high, POSITIVE)):
            if late is None:
                continue
            if to_float(late) not in allowed:
                raise ArgumentError(f"late_{name}={late!r}: expected {allowed}. Use late_{name}=None, for example.")
            object.__setattr__(self, f"late_{name}", to_float(late))

    @property
    def unbounded_steps(self) -> int:
        """Number of norms in the warm-up."""
        return self.warmup

    def init(self, slots: int, device: torch.device) -> State:
        """Return the running mean and the number of the norms so far, both 0."""
        zero = zeros(slots, device=device)
        return {"mean": zero, "count": zero.long()}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the upper ends of the bands, and the mean with the norm after scaling."""
        norms, mean, count = totals.norms, state["mean"], state["count"]
        bound = self._upper(mean, count)
        raised = torch.maximum(norms, torch.minimum(self.floors(totals, state), self.max_coef * norms))
        clipped = torch.minimum(raised, bound.clamp(max=self.cap))
        # The state is the corrected mean s / (1 - b^t), so x enters with the weight (1 - b) / (1 - b^t).
        weight = (1 - self.decay) / (1 - self.decay ** (count + 1).to(norms.dtype))
        return bound, {"mean": mean + weight * (clipped - mean), "count": count + 1}

    def floors(self, totals: Totals, state: State) -> Tensor:
        """Return the lower ends of the bands, 0 in warm-up."""
        mean, count = state["mean"], state["count"]
        floors = (self._multiple(self.low, self.late_low, mean, count) * mean).clamp(min=self.min_norm)
        return torch.where(count < self.warmup, 0.0, floors)

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        mean, count = state["mean"], state["count"]
        # All norms are above 0, so a mean of 0 is valid only before the first norm, or with a cap of 0.
        return {"mean": is_size(mean) & ((count == 0) | (mean > 0) | (self.cap == 0)), "count": is_count(count)}

    def restart(self, norms: Tensor, state: State) -> State:
        """Return the mean of the last norms before clipping."""
        # The mean gets the weight of that many norms.
        count = state["count"].clamp(min=max(self.warmup, norms.shape[1]))
        return {"mean": norms.clamp(max=self.cap).mean(1), "count": count}

    def _upper(self, mean: Tensor, count: Tensor) -> Tensor:
        upper = self._multiple(self.high, self.late_high, mean, count) * mean
        return torch.where(count < self.warmup, math.inf, upper)

    def _multiple(self, early: float, late: float | None, mean: Tensor, count: Tensor) -> Tensor:
        """Return the multiple of each slot at its step of the schedule."""
        if late is None or late == early:
            return torch.full_like(mean, early)
        # Without a transition, the first step after `switch` has the late multiple already.
        steps = count - self.switch + (not self.transition)
        progress = (steps.to(mean.dtype) / max(self.transition, 1)).clamp(0, 1)
        return early + (late - early) * progress
