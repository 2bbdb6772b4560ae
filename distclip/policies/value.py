"""Clip by value: clamp every element, which changes the gradient's direction and needs no sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, short_repr
from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from .policy import State, Verdict
from .validation import to_float

__all__ = ["Value", "value"]


@dataclass(frozen=True, slots=True)
class Value:
    """Clamp every element to [low, high].

    The report still contains the Euclidean norm of the whole gradient.

    Args:
        low: lower bound.
        high: upper bound, ≥ low.

    Raises:
        ArgumentError: a lower bound above the upper one, or NaN.

    >>> Value(-0.5, 0.5).spec.limits
    (-0.5, 0.5)
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        low, high = to_float(self.low), to_float(self.high)
        if not low <= high:
            given = self.high if low == -high else (self.low, self.high)
            raise ArgumentError(
                f"clip_value={short_repr(given)}: the bounds must be two numbers, the lower one first. "
                "Use clip_value=0.5 for [-0.5, 0.5], or clip_value=(low, high)."
            )
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs: the norm of the whole model, and the limits of the elements."""
        return NormSpec(limits=(self.low, self.high))

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty state."""
        return {}

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the limits, which are constant, with coefficients of 1."""
        return Verdict(torch.ones_like(totals.norms), limits=(self.low, self.high)), state

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return no masks, because there is no state."""
        return {}


def value(low: float, high: float | None = None) -> Value:
    """Clamp every element: `value(0.5)` to [-0.5, 0.5], `value(-0.1, 0.5)` to [-0.1, 0.5].

    Args:
        low: lower bound. Without `high`, the bound on both sides, ≥ 0.
        high: upper bound.

    Raises:
        ArgumentError: a lower bound above the upper one, a negative bound without `high`, or NaN.

    >>> value(0.5)
    Value(low=-0.5, high=0.5)
    """
    return Value(-to_float(low), low) if high is None else Value(low, high)
