r"""Divide one bound between the parameters, so that a gradient can be clipped before the others exist.

.. math:: \lVert g_i \rVert^2 \le c^2 s_i^2 + \sum_{j\ before\ i} (c^2 s_j^2 - used_j), \qquad \sum_i s_i^2 = 1

Parameter i has a share s_i² of the squared bound: its usual share of the squared norm. It can also use what the
parameters before it in the same backward have left over. The total never exceeds c², in any order and for any shares,
so the bound on the norm of the whole gradient holds in every step. The shares only affect how much is clipped
needlessly in a step whose norm is below the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from .history import zeros
from .norm_policy import coefficient
from .policy import Allocation, State, Verdict
from .validation import FRACTION, NOT_NEGATIVE, convert_fields, is_count

__all__ = ["Budget", "budget"]

_MARGIN = 1e-6
"""Relative margin below the bound, for the rounding of coefficients to float32. torch's epsilon has the same size."""

_FLOOR = 0.02
"""Fraction of the squared bound that is shared by size, so that a parameter without gradients so far has a share."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bound the norm of the whole gradient within backward, without waiting for the other gradients.

    Args:
        max_norm: bound of the whole gradient, ≥ 0. `inf` measures and never clips.
        decay: of the running mean of the shares, in [0, 1). The first steps have equal weights.
        cap: bound of every single parameter, however much is left over, ≥ 0.

    Raises:
        ArgumentError: an argument outside of its range.

    >>> Budget(1.0).spec.per
    'tensor'
    """

    max_norm: float = 1.0
    decay: float = 0.99
    cap: float = math.inf

    def __post_init__(self) -> None:
        convert_fields(self, max_norm=NOT_NEGATIVE, decay=FRACTION, cap=NOT_NEGATIVE)

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs: one for each parameter."""
        return NormSpec(per="tensor")

    def init(self, slots: int, device: torch.device) -> State:
        """Return the state before the first step: no shares."""
        return {"shares": zeros(slots, device=device), "num_seen": zeros(slots, device=device)}

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the verdict on a step whose norms are all known, from one bound on the whole gradient.

        The shares are learned from the norms before clipping. So the budget divides the bound as ordinary clipping
        would, even while most steps are clipped.

        Collectives: none. Host syncs: none.
        """
        bound = totals.norms.new_full((), self.max_norm)
        coefs = coefficient(totals.norm, bound, _MARGIN).to(totals.norms).expand(totals.norms.shape)
        coefs = torch.minimum(coefs, coefficient(totals.norms, self.cap, 0.0).to(coefs))
        return Verdict(coefs), self._learn(totals.powers, state)

    def allocate(self, state: State, sizes: Sequence[float], parents: Sequence[int]) -> Allocation:
        """Return the allocation of the bound in one backward, see `BackwardPolicy`."""
        shares, total = state["shares"].tolist(), float(state["shares"].sum())
        floor = _FLOOR if total > 0 else 1.0
        # Norms of tensors differ less than their sizes do.
        roots = [math.sqrt(size) for size in sizes]
        pairs = zip(shares, roots, strict=True)
        mixed = [(1 - floor) * share / (total or 1.0) + floor * root / (sum(roots) or 1.0) for share, root in pairs]
        return _Remainder(self.max_norm, self.cap, mixed)

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        return {"shares": (state["shares"] >= 0) & (state["shares"] <= 1), "num_seen": is_count(state["num_seen"])}

    def _learn(self, powers: Tensor, state: State) -> State:
        """Return the state after a step. A parameter whose gradient is not finite keeps its share."""
        shares, num_seen = state["shares"], state["num_seen"]
        finite = powers.isfinite()
        known = powers.where(finite, 0.0)
        total = known.sum()
        # The shares of all parameters still add up to 1.
        observed = known / total * (1 - shares.where(~finite, 0.0).sum())
        weight = (1 / (num_seen + 1)).clamp(min=1 - self.decay)
        usable = finite & (total > 0)
        return {
            "shares": torch.where(usable, shares + weight * (observed - shares), shares),
            "num_seen": torch.where(usable, num_seen + 1, num_seen),
        }


class _Remainder:
    """Unused part of a squared bound in one backward.

    Args:
        max_norm: the bound.
        cap: bound of every slot.
        shares: each slot's share of the squared bound. They add up to 1.
    """

    def __init__(self, max_norm: float, cap: float, shares: Sequence[float]) -> None:
        self._left = (max_norm * (1 - _MARGIN)) ** 2
        self._cap = cap**2
        # Without a bound nothing needs to be reserved.
        self._shares = [0.0 if math.isinf(self._left) else share * self._left for share in shares]
        self._reserved = sum(self._shares)

    def take(self, slot: int, power: float) -> float:
        """Return the coefficient of a gradient, and subtract what the scaled gradient uses."""
        self._reserved = max(0.0, self._reserved - self._shares[slot])
        self._shares[slot] = 0.0
        allowed = min(max(0.0, self._left - self._reserved), self._cap)
        coef = 1.0 if power <= allowed else math.sqrt(allowed / power)
        self._left -= coef * coef * power
        return coef


def budget(max_norm: float = 1.0, decay: float = 0.99, cap: float = math.inf) -> Budget:
    r"""Bound the norm of the whole gradient within backward, for `GradClipper.in_backward`.

    Every parameter has a share of the squared bound: the running mean of its share of the squared norm. It can also use
    what the parameters before it have left over. So the norm of the whole gradient is at most `max_norm` in every step,
    including the first, and no parameter waits for another. The price is that a parameter whose gradient is much larger
    than usual is clipped even where the norm of the whole gradient is below the bound. In the first step, shares are
    proportional to the square roots of the parameters' sizes.

    In `GradClipper.step`, where all norms are known, the policy scales the whole gradient by one coefficient, and
    learns the shares.

    Args:
        max_norm: bound of the whole gradient, ≥ 0. `inf` measures and never clips.
        decay: of the running mean of the shares, in [0, 1).
        cap: bound of every single parameter, however much is left over, ≥ 0.

    Raises:
        ArgumentError: an argument outside of its range.

    >>> budget(0.5)
    Budget(max_norm=0.5, decay=0.99, cap=inf)
    """
    return Budget(max_norm, decay, cap)
