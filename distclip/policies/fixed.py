"""Bounds that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import device_constant
from ..errors import ArgumentError
from ..norms.reduce import Totals
from .policy import State, as_number

__all__ = ["Fixed"]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A bound that never moves.

    Args:
        max_norm: ≥ 0; `inf` measures and never clips. Several of them are the bounds of the slots, in order.

    Raises:
        ArgumentError: a bound that is negative or no number.
    """

    max_norm: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        many = isinstance(self.max_norm, Sequence) and not isinstance(self.max_norm, str)
        bounds = tuple(map(as_number, self.max_norm)) if many else (as_number(self.max_norm),)  # type: ignore[arg-type]
        if not all(bound >= 0 for bound in bounds) or not bounds:
            raise ArgumentError(
                f"max_norm={self.max_norm!r}: the bound must be a number ≥ 0. "
                "Write max_norm=1.0, or max_norm=inf to measure without clipping."
            )
        object.__setattr__(self, "max_norm", bounds if many else bounds[0])

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing to remember."""
        return {}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound, whatever the norms."""
        bounds = self.max_norm if isinstance(self.max_norm, tuple) else (self.max_norm,)
        norms = totals.norms
        bound = device_constant(bounds, norms.device, norms.dtype)
        return bound if len(bounds) == len(norms) else bound.expand(norms.shape), state
