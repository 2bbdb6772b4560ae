"""What a policy is asked and what it can decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..norms.reduce import Totals

__all__ = ["Clamp", "Per", "Policy", "Scale", "State", "Threshold", "Verdict", "as_number"]

Per: TypeAlias = Literal["model", "group", "tensor", "row"]
"""What has a norm, and so a slot, of its own: the whole model, each named group of parameters, each parameter, or each
row (place along dim 0) of each parameter, one with a single dim counting as one row."""

State: TypeAlias = dict[str, Tensor]
"""What a policy remembers: tensors whose first dim is the slot, on the device of the norms."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply every gradient by the coefficient of its slot, or leave the step out.

    Args:
        coefs: (slots,) float64 on the device of the norms, ≤ 1.
        skip: 0-d bool, whether the step is to change nothing; None for never.
        bounds: (slots,) float64, the norms that were allowed, inf where any is; None for what has no such thing.
    """

    coefs: Tensor
    skip: Tensor | None = None
    bounds: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Clamp:
    """Clamp every element to [low, high]."""

    low: float
    high: float


Verdict: TypeAlias = Scale | Clamp


class Threshold(Protocol):
    """A rule for which norm is allowed: a pure function of the totals and of its own state.

    A frozen dataclass with these two methods is a threshold; neither measuring nor reducing knows of it. One that
    follows the norms may also have `seed(norms, state) -> state`, the state after starting anew from the last raw
    norms, (slots, window); a `cap`, the bound that always holds; and one that compares with the parameters says
    `needs_weights = True`.
    """

    def init(self, slots: int, device: torch.device) -> State:
        """The state before the first step; empty for a rule that remembers nothing."""
        ...

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound of each slot, (slots,) float64, `inf` where there is none; and the state after this step.

        Every norm may be anything here: what comes of one that is not finite, or of a slot without gradient, is
        discarded by the caller. No host sync.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """What a clipper asks of a policy."""

    @property
    def norm_type(self) -> float:
        """p of the norm to measure."""
        ...

    @property
    def per(self) -> Per:
        """What has a slot of its own."""
        ...

    def init(self, slots: int, device: torch.device) -> State:
        """The state before the first step."""
        ...

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """The verdict on this step, and the state after it. No host sync, no collective."""
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
