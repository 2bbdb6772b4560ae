"""Clipping by value: element-wise, which changes the gradient's direction and needs no sum over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..norms.reduce import Totals
from .policy import Clamp, Per, State, as_number

__all__ = ["Value", "value"]


@dataclass(frozen=True, slots=True)
class Value:
    """Clamp every element to [low, high].

    Args:
        low: lower bound.
        high: upper bound, ≥ low.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        low, high = as_number(self.low), as_number(self.high)
        if not low <= high:
            raise ArgumentError(
                f"clip_value={(self.low, self.high)!r}: the bounds must be two numbers, the lower one first. "
                "Write clip_value=0.5 for [-0.5, 0.5], or clip_value=(low, high)."
            )
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    @property
    def norm_type(self) -> float:
        """The norm that a clipper reports beside: the Euclidean one."""
        return 2.0

    @property
    def per(self) -> Per:
        """One norm is reported."""
        return "model"

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing to remember."""
        return {}

    def decide(self, totals: Totals, state: State) -> tuple[Clamp, State]:
        """The same clamp whatever the norm."""
        return Clamp(self.low, self.high), state


def value(low: float, high: float | None = None) -> Value:
    """Clamp every element: `value(0.5)` to [-0.5, 0.5], `value(-0.1, 0.5)` to [-0.1, 0.5].

    Args:
        low: lower bound; alone, the bound on both sides, ≥ 0.
        high: upper bound.

    Raises:
        ArgumentError: a lower bound above the upper one, a negative bound alone, NaN.

    >>> value(0.5)
    Value(low=-0.5, high=0.5)
    """
    return Value(-as_number(low), low) if high is None else Value(low, high)
