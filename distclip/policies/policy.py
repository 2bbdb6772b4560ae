"""Declare the protocols `Policy` and `Threshold`, the base class `Rule`, and the `Verdict` on a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..norms.reduce import Totals
from ..norms.spec import NormSpec

__all__ = [
    "Allocation",
    "BackwardPolicy",
    "CheckedPolicy",
    "Policy",
    "Rule",
    "State",
    "Threshold",
    "Verdict",
    "mask_known",
]

State: TypeAlias = dict[str, Tensor]
"""State of a policy: tensors whose first dim is the slot, on the device of the norms. A checkpoint contains it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decision of a policy about the gradients of one step.

    Args:
        coefs: (slots,), in [0, max_coef], in the dtype and on the device of the norms (float64 unless the device lacks
            it): the factor by which the gradients of each slot are multiplied.
        skip: 0-d bool on that device: whether to skip the step, so that it changes nothing. None for a policy that
            never skips.
        bounds: (slots,), like `coefs`: the largest norm allowed for each slot, inf for no bound. None for a policy that
            does not bound norms.
        limits: (low, high): every element of every gradient is clamped to this interval. None for no clamping.
        max_coef: largest coefficient of the policy, ≥ 1. 1 for a policy that only scales down.
    """

    coefs: Tensor
    skip: Tensor | None = None
    bounds: Tensor | None = None
    limits: tuple[float, float] | None = None
    max_coef: float = 1.0


@runtime_checkable
class Policy(Protocol):
    """Pure function from the norms of a step to a verdict on the gradients.

    The spec declares which norms the policy needs. Every rank computes the verdict from equal norms, so the function
    must be deterministic. Any object with these members is a policy.
    """

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs. The spec is constant and equal on every rank."""
        ...

    def init(self, slots: int, device: torch.device) -> State:
        """Return the state before the first step, empty for a policy without state."""
        ...

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the verdict on a step and the state after it, without writing to `state`.

        Collectives: none. Host syncs: none.
        """
        ...


class Allocation(Protocol):
    """Coefficients of one backward, computed one by one as gradients arrive."""

    def take(self, slot: int, power: float) -> float:
        """Return the coefficient of the gradient of a measured slot.

        Args:
            slot: index of the parameter among all measured slots.
            power: squared norm of the parameter's whole gradient, finite. 0 without a gradient.
        """
        ...


@runtime_checkable
class BackwardPolicy(Policy, Protocol):
    """Policy that can clip a gradient within backward, see `GradClipper.in_backward`.

    After the backward, `decide` is called with all norms. The state that it returns is used in the next backward, and
    its verdict is ignored.
    """

    def allocate(self, state: State, sizes: Sequence[float], parents: Sequence[int]) -> Allocation:
        """Return the allocation of one backward.

        Args:
            state: of the policy, before this backward.
            sizes: number of elements of each measured slot, one for each parameter.
            parents: slot of the policy that each measured slot is part of.
        """
        ...


class CheckedPolicy(Policy, Protocol):
    """Policy whose verdicts are always valid, and which can check the values of a loaded state."""

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        ...


class Threshold(Protocol):
    """Rule for the largest norm that is allowed: a pure function of the norms and of the rule's own state.

    Any object with these two methods is a threshold. A frozen dataclass is recommended, because the ranks compare the
    `repr` of their policies. Subclass `distclip.policies.Rule` for a rule that needs the norms of the parameters, has
    a cap or can restart.
    """

    def init(self, slots: int, device: torch.device) -> State:
        """Return the state before the first step, empty for a rule without state."""
        ...

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound of each slot and the state after this step.

        The bounds are (slots,) float64, inf for no bound. Norms can have any value here, NaN and Inf included. The
        caller discards the result of a step with a non-finite norm, and the result of a slot whose norm is 0.

        Collectives: none. Host syncs: none.
        """
        ...


class Rule(Threshold):
    """Base class of thresholds with a cap, a restart, or a need for the norms of the parameters.

    Attributes:
        needs_weights: whether the rule reads `totals.weight_norms`. False by default.
        can_restart: whether `restart` is implemented. False by default.
        cap: hard upper bound, which also applies during warm-up. `__call__` returns bounds without the cap, and
            `NormPolicy` applies it to them, so that a norm above the cap can be distinguished from a norm above the
            rule's bound. inf by default.
        max_coef: largest factor by which `NormPolicy` scales a norm up to the floor of `floors`, ≥ 1. 1 by default,
            which scales nothing up.
    """

    __slots__ = ()

    needs_weights: bool = False
    can_restart: bool = False
    cap: float = math.inf
    max_coef: float = 1.0

    @property
    def moment_eps(self) -> float | None:
        """Lower limit of √v for second moments v, for a rule that reads `totals.update_rms`."""
        return None

    @property
    def unbounded_steps(self) -> int:
        """Number of norms at the start to which only the cap applies. If it is not 0, `restart` exists."""
        return 0

    def floors(self, totals: Totals, state: State) -> Tensor:
        """Return the floors, to which smaller norms are scaled up, (slots,) like the bounds. 0 by default.

        This is called with the state before the step, if `max_coef` is above 1. A floor above the bound has no effect.
        """
        return torch.zeros_like(totals.norms)

    def ceilings(self, totals: Totals, state: State) -> Tensor | None:
        """Return the largest coefficients, (slots,), in [0, 1]. None by default, which means 1.

        This is called with the state after the step. In contrast to a bound, a ceiling never skips a step.
        """
        return None

    def restart(self, norms: Tensor, state: State) -> State:
        """Return the state after a restart from the last norms.

        Args:
            norms: (slots, window), before clipping, in any order.
            state: of the rule after this step. The caller keeps it for the slots that need no restart.
        """
        return state

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return a mask for each tensor of a loaded state, true where the value is valid.

        With an invalid value, a rule could clip nothing, or everything, from then on. By default only NaN is invalid,
        and only in a tensor that has no NaN before the first step.

        Args:
            state: of a checkpoint, with the keys, shapes and dtypes of the rule's state.

        Returns:
            {key: bool tensor of the shape of the state}.
        """
        return mask_known(self.init, state)


def mask_known(init: Callable[[int, torch.device], State], state: State) -> dict[str, Tensor]:
    """Return masks that are false for NaN, except in tensors that have NaN before the first step.

    Args:
        init: returns the state before the first step.
        state: of a checkpoint.
    """
    masks = {}
    for key, value in state.items():
        fresh = init(len(value), value.device)
        masks[key] = ~value.isnan() | fresh[key].isnan().any()
    return masks
