"""Adapt a user's threshold, which needs only two methods, to the interface of `Rule`, and check its results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..norms.reduce import Totals
from .policy import Rule, State, Threshold, mask_known
from .validation import NOT_NEGATIVE, Range, to_float

__all__ = ["as_rule", "as_vector", "check_first_state", "check_next_state"]

_FACTOR = Range(1, exclude=(math.inf,))


def as_rule(threshold: Threshold) -> Rule:
    """Return one of distclip's rules unchanged, or wrap any other into one that checks its results.

    Args:
        threshold: an object with the two methods of `Threshold`. It may also have other members of `Rule`.

    Raises:
        ArgumentError: one of the two methods is missing, or `cap` or `max_coef` is invalid.
    """
    if isinstance(threshold, type) or not callable(threshold) or not callable(getattr(threshold, "init", None)):
        raise ArgumentError(
            f"threshold={threshold!r:.80}: expected an object with the methods init(slots, device) and "
            "__call__(totals, state). Use threshold=distclip.Fixed(1.0), for example."
        )
    # A user's subclass can return anything, so only classes of this package are trusted.
    if isinstance(threshold, Rule) and type(threshold).__module__.startswith(f"{__package__}."):
        return threshold
    return _CustomRule(threshold)


class _CustomRule(Rule):
    """Rule that wraps a user's threshold.

    Args:
        threshold: see `as_rule`.
    """

    def __init__(self, threshold: Any) -> None:
        self._threshold = threshold
        self.needs_weights = bool(getattr(threshold, "needs_weights", Rule.needs_weights))
        self.can_restart = bool(getattr(threshold, "can_restart", hasattr(threshold, "restart")))
        for name, default, allowed in (("cap", Rule.cap, NOT_NEGATIVE), ("max_coef", Rule.max_coef, _FACTOR)):
            number = getattr(threshold, name, default)
            if to_float(number) not in allowed:
                raise ArgumentError(f"{name}={number!r:.60}: expected {allowed}. Use {name}=1.0, for example.")
            vars(self)[name] = to_float(number)

    @property
    def moment_eps(self) -> float | None:
        """Lower limit of √v for second moments v, if the threshold has a member of this name."""
        eps = getattr(self._threshold, "moment_eps", None)
        return None if eps is None else float(eps)

    def init(self, slots: int, device: torch.device) -> State:
        """Return the threshold's state before the first step."""
        return check_first_state(f"threshold={self._threshold!r:.80}", self._threshold.init(slots, device), slots)

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the threshold's bounds and state.

        Raises:
            ArgumentError: they have a wrong type, shape or dtype. All ranks compute them from the same norms, so all of
                them raise.
        """
        who, result = f"threshold={self._threshold!r:.80}", self._threshold(totals, state)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(f"{who}: it returned {result!r:.80}. Return (bounds, state).")
        bounds, new_state = result
        return as_vector(who, "bounds", bounds, totals.norms), check_next_state(who, new_state, state)

    def floors(self, totals: Totals, state: State) -> Tensor:
        """Return the threshold's floors."""
        floors = self._threshold.floors(totals, state)
        return as_vector(f"threshold={self._threshold!r:.80}", "floors", floors, totals.norms)

    def ceilings(self, totals: Totals, state: State) -> Tensor | None:
        """Return the threshold's ceilings, if it has any."""
        ceilings = getattr(self._threshold, "ceilings", None)
        values = None if ceilings is None else ceilings(totals, state)
        who = f"threshold={self._threshold!r:.80}"
        return None if values is None else as_vector(who, "ceilings", values, totals.norms)

    def restart(self, norms: Tensor, state: State) -> State:
        """Return the threshold's state after a restart."""
        return check_next_state(f"threshold={self._threshold!r:.80}", self._threshold.restart(norms, state), state)

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        mask_valid = getattr(self._threshold, "mask_valid", None)
        return mask_known(self.init, state) if mask_valid is None else dict(mask_valid(state))


def as_vector(who: str, name: str, value: Any, norms: Tensor) -> Tensor:
    """Return a vector that the user's code has computed, in the dtype of the norms.

    Args:
        who: the object that returned it, for messages.
        name: of the vector, for messages.
        value: any object.
        norms: (slots,).

    Raises:
        ArgumentError: it is not a (slots,) tensor of floats on the device of the norms.

    Host syncs: none.
    """
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{who}: {name}={value!r:.60} is not a tensor. Return torch.full_like(totals.norms, 1.0).")
    if value.shape != norms.shape or value.device != norms.device or not value.dtype.is_floating_point:
        raise ArgumentError(
            f"{who}: {name} has shape {tuple(value.shape)}, dtype {value.dtype} and device {value.device}. Return one "
            f"number for each norm: shape {tuple(norms.shape)}, dtype {norms.dtype}, device {norms.device}."
        )
    return value.to(norms.dtype)


def check_first_state(who: str, state: Any, slots: int) -> State:
    """Return the state before the first step.

    Args:
        who: the object that returned it, for messages.
        state: any object.
        slots: number of norms.

    Raises:
        ArgumentError: it is not a dictionary of tensors whose first dim is the slot.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ArgumentError(f"{who}: init returned {state!r:.80}. Return a dictionary of tensors, empty for no state.")
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (slots,):
            raise ArgumentError(
                f"{who}: init returned {key}={value!r:.60}, and {slots} slots need a tensor with {slots} rows. Return "
                "torch.zeros(slots, device=device), for example."
            )
    return dict(state)


def check_next_state(who: str, state: Any, before: State) -> State:
    """Return the state after a step.

    Args:
        who: the object that returned it, for messages.
        state: any object.
        before: the state before the step.

    Raises:
        ArgumentError: its keys, shapes or dtypes differ from those of `before`.

    Host syncs: none.
    """
    if not isinstance(state, dict) or state.keys() != before.keys():
        raise ArgumentError(
            f"{who}: it returned the state {state!r:.80}. Return a dictionary with the keys of init, {sorted(before)}."
        )
    for key, old in before.items():
        new = state[key]
        if not isinstance(new, Tensor) or _kind_of(new) != _kind_of(old):
            raise ArgumentError(
                f"{who}: it returned {key}={new!r:.60} of another kind. Return a tensor like that of init: shape "
                f"{tuple(old.shape)}, dtype {old.dtype}, device {old.device}."
            )
    return state


def _kind_of(tensor: Tensor) -> tuple[object, ...]:
    """Return the properties of a state tensor that must not change between steps."""
    # A state may begin in float32 and continue in the dtype of the norms.
    return tensor.shape, tensor.device, "float" if tensor.dtype.is_floating_point else tensor.dtype
