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
            it): the factor of the gradients of each slot.
        skip: 0-d bool on that device: whether the step must change nothing. None for never.
        bounds: (slots,), like `coefs`: the norms that were allowed, inf for any norm. None without bounds on norms.
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
    """Pure function from the norms of a step, declared in its spec, to a verdict on the gradients.

    Every rank computes the verdict from equal norms, so it must be deterministic. Any object with these members is a
    policy.
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
    """Coefficients of one backward, given out one by one as gradients arrive."""

    def take(self, slot: int, power: float) -> float:
        """Return the coefficient of the gradient of a measured slot.

        Args:
            slot: index of the parameter among all measured slots.
            power: squared norm of its whole gradient, finite. 0 without a gradient.
        """
        ...


@runtime_checkable
class BackwardPolicy(Policy, Protocol):
    """Policy that can clip a gradient within backward, see `GradClipper.in_backward`.

    After the backward, `decide` is called with all norms. Its state is used in the next backward, and its verdict is
    not.
    """

    def allocate(self, state: State, sizes: Sequence[float], parents: Sequence[int]) -> Allocation:
        """Return the allocation of one backward.

        Args:
            state: of the policy.
            sizes: number of elements of each measured slot, one for each parameter.
            parents: slot of the policy that each measured slot is part of.
        """
        ...


class CheckedPolicy(Policy, Protocol):
    """Policy whose verdicts are valid, and which knows the values that its state may have."""

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the values that a loaded state may have, see `Rule.mask_valid`."""
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
        cap: hard upper bound, in warm-up too. `NormPolicy` applies it to the bounds of `__call__`, which must be
            without it, so that a step beyond the cap can be distinguished from a step beyond the rule. inf by default.
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
        """Least square root of a second moment, for a rule that reads `totals.update_rms`. None for any other."""
        return None

    @property
    def unbounded_steps(self) -> int:
        """Number of first norms to which only the cap applies. `restart` is implemented if it is not 0."""
        return 0

    def floors(self, totals: Totals, state: State) -> Tensor:
        """Return the norm to which smaller norms are scaled up, (slots,) like the bounds. 0 by default.

        It is called with the state before the step, if `max_coef` is above 1. A floor above the bound has no effect.
        """
        return torch.zeros_like(totals.norms)

    def ceilings(self, totals: Totals, state: State) -> Tensor | None:
        """Return the largest coefficients, (slots,), in [0, 1]. None by default, for 1.

        It is called with the state after the step. In contrast to a bound, a ceiling never skips a step.
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
        """Return a mask of the values that each tensor of a loaded state may have, by key.

        A rule that was loaded with other values would clip nothing, or everything, for good. By default only NaN is
        invalid, unless the state before the first step has NaN.

        Args:
            state: of a checkpoint, with the keys, shapes and dtypes of the rule's state.

        Returns:
            {key: bool tensor of the shape of the state}.
        """
        return mask_known(self.init, state)


def mask_known(init: Callable[[int, torch.device], State], state: State) -> dict[str, Tensor]:
    """Return masks that are false for a NaN that the state before the first step does not have either.

    Args:
        init: returns that state.
        state: of a checkpoint.
    """
    masks = {}
    for key, value in state.items():
        fresh = init(len(value), value.device)
        masks[key] = ~value.isnan() | fresh[key].isnan().any()
    return masks
