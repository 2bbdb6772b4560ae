"""Apply the coefficients that a policy computed in the step before, because those of this step come too late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from .budget import Budget
from .policy import Allocation, Policy, State, Verdict
from .validation import to_float

__all__ = ["Lagged", "lagged"]

_OWN = "lagged_coefs"
"""Key in the state of the coefficients for the next step."""

_INNER = "lagged."
"""Prefix of the keys of the policy's own state."""


@dataclass(frozen=True, slots=True)
class Lagged:
    """Apply the coefficients that a policy computed in the step before.

    Args:
        policy: any policy with Euclidean norms per model, group or tensor.
        budget: bound that holds in this step, or a `Budget`. None for no bound: then a spike passes once.

    Raises:
        ArgumentError: the policy needs other norms, skips steps, or (with a budget) has groups or excludes parameters.
    """

    policy: Policy
    budget: Budget | float | None = None
    _budget: Budget | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.policy, type) or not isinstance(self.policy, Policy):
            raise ArgumentError(f"policy={self.policy!r:.80}: not a policy. Use lagged(distclip.zclip(cap=1.0)).")
        spec = self.policy.spec
        if not spec.has_only_tensor_norms:
            raise ArgumentError(
                f"policy={self.policy!r:.120}: it needs more than the Euclidean norms of tensors. Use a policy with "
                "norm_type=2.0 per model, group or tensor."
            )
        # NormPolicy has this attribute, and any other policy may have it.
        if getattr(self.policy, "skip", False) is True:
            raise ArgumentError(
                f"policy={self.policy!r:.120}: it skips steps, and the step is over when it decides. Use skip=False."
            )
        budget: Any = self.budget
        if budget is not None and not isinstance(budget, Budget):
            if not to_float(budget) >= 0:
                raise ArgumentError(f"budget={budget!r:.80}: expected a number ≥ 0. Use budget=1.0, for example.")
            budget = Budget(to_float(budget))
        if budget is not None and (spec.per == "group" or spec.exclude):
            raise ArgumentError(
                f"budget={budget!r:.80}: a budget bounds the whole gradient, and the policy divides it. Use a policy "
                "per model or tensor without exclude=, or budget=None."
            )
        object.__setattr__(self, "_budget", budget)

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs: with a budget one for each parameter, otherwise those of `policy`."""
        return self.policy.spec if self._budget is None else NormSpec(per="tensor")

    def init(self, slots: int, device: torch.device) -> State:
        """Return the state before the first step, in which only the budget clips."""
        state = {_INNER + key: value for key, value in self.policy.init(slots, device).items()}
        state[_OWN] = torch.ones(slots, dtype=torch.float64, device=device)
        return state if self._budget is None else state | self._budget.init(slots, device)

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the coefficients of the step before, and keep those of this one.

        Collectives: none. Host syncs: none.
        """
        inner_state = {key.removeprefix(_INNER): state[key] for key in state if key.startswith(_INNER)}
        verdict, inner_state = self.policy.decide(self._inner_totals(totals), inner_state)
        new_state = {_INNER + key: value for key, value in inner_state.items()}
        usable = verdict.coefs.isfinite() & totals.finite.on(verdict.coefs.device)
        new_state[_OWN] = torch.where(usable, verdict.coefs.to(state[_OWN]), state[_OWN])
        coefs = state[_OWN].to(totals.norms)
        if self._budget is not None:
            scaled = replace(totals, powers=totals.powers * coefs**2)
            bounded, shares = self._budget.decide(scaled, {key: state[key] for key in ("shares", "num_seen")})
            coefs, new_state = coefs * bounded.coefs, new_state | shares
        return Verdict(coefs), new_state

    def allocate(self, state: State, sizes: Sequence[float], parents: Sequence[int]) -> Allocation:
        """Return the allocation of one backward, see `BackwardPolicy`."""
        inner = None if self._budget is None else self._budget.allocate(state, sizes, parents)
        return _Constant(state[_OWN].tolist(), parents, inner)

    def _inner_totals(self, totals: Totals) -> Totals:
        """Return the totals for the inner policy."""
        if self._budget is None or self.policy.spec.per == "tensor":
            return totals
        # Every slot gets the norm of the model, so that the policy computes the same coefficient for each.
        return replace(totals, powers=totals.powers.sum().expand(totals.powers.shape).contiguous())


class _Constant:
    """Coefficients that were computed before the backward.

    Args:
        coefs: of each slot of the policy.
        parents: slot of the policy that each measured slot is part of.
        inner: allocation of a bound on the gradients after these coefficients. None for no bound.
    """

    def __init__(self, coefs: Sequence[float], parents: Sequence[int], inner: Allocation | None) -> None:
        self._coefs, self._parents, self._inner = coefs, parents, inner

    def take(self, slot: int, power: float) -> float:
        """Return the coefficient of a gradient."""
        coef = self._coefs[self._parents[slot]]
        return coef if self._inner is None else coef * self._inner.take(slot, coef * coef * power)


def lagged(policy: Policy, budget: Budget | float | None = None) -> Lagged:
    """Apply the coefficients that a policy computed in the step before, for `GradClipper.in_backward`.

    Within backward the norm of the whole gradient is not known yet, but that of the step before is. The coefficient is
    right as long as norms change slowly. It is one step late: **a spike passes once**, at full size, and the step after
    it is scaled down for nothing. Pass a budget as a bound that holds in every step.

    Args:
        policy: any policy with Euclidean norms per model, group or tensor, for example `zclip(cap=1.0)`.
        budget: bound of the whole gradient in every step, a number ≥ 0 or `budget(1.0)`. None for no bound.

    Raises:
        ArgumentError: the policy needs other norms, skips steps, or (with a budget) has groups or excludes parameters.

    >>> from distclip import global_norm
    >>> lagged(global_norm(1.0), budget=2.0).budget
    2.0
    """
    return Lagged(policy, budget)
