"""What a policy can decide, and what one has to offer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

__all__ = ["Clamp", "Policy", "Scale", "Verdict", "as_number"]


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply every gradient by `coef`, 0-d float64 on the device of the norm, ≤ 1."""

    coef: Tensor


@dataclass(frozen=True, slots=True)
class Clamp:
    """Clamp every element to [low, high]."""

    low: float
    high: float


Verdict: TypeAlias = Scale | Clamp


@runtime_checkable
class Policy(Protocol):
    """What a clipper asks of a policy."""

    @property
    def norm_type(self) -> float:
        """p of the norm to measure."""
        ...

    def decide(self, norm: Tensor) -> Verdict:
        """The verdict on a total norm, 0-d float64. No host sync, no collective."""
        ...


def as_number(value: Any) -> float:
    """A bound as a float: what float() takes (numpy and 0-d tensors too), NaN for what it does not.

    >>> as_number("inf"), as_number(None)
    (inf, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
