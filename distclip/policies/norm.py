r"""Clipping by norm: a threshold rule says which norm is allowed, and longer gradients are shortened to it.

.. math:: coef = \min\left(1, \frac{bound}{norm + 10^{-6}}\right)

Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1;
the 1e-6 is torch.nn.utils.clip_grad_norm_'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError
from .verdict import Scale, as_number

__all__ = ["Fixed", "NormPolicy", "coefficient", "global_norm"]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A bound that never moves.

    Args:
        max_norm: ≥ 0; `inf` measures and never clips.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        bound = as_number(self.max_norm)
        if not bound >= 0:
            raise ArgumentError(
                f"max_norm={self.max_norm!r}: the bound must be a number ≥ 0. "
                "Write max_norm=1.0, or max_norm=inf to measure without clipping."
            )
        object.__setattr__(self, "max_norm", bound)


@dataclass(frozen=True, slots=True)
class NormPolicy:
    """Shorten the whole gradient to a bound on its norm.

    Args:
        threshold: the bound.
        norm_type: p of the norm: any number, `inf` for the largest element.
    """

    threshold: Fixed = field(default_factory=Fixed)
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        p = as_number(self.norm_type)
        if math.isnan(p):
            raise ArgumentError(
                f'norm_type={self.norm_type!r}: expected the p of a p-norm. Write norm_type=2.0, or "inf".'
            )
        object.__setattr__(self, "norm_type", p)

    def decide(self, norm: Tensor) -> Scale:
        """The coefficient for a total norm."""
        return Scale(coefficient(norm, self.threshold.max_norm))


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)) in float64; exactly 1 for max_norm = inf, whatever the norm.

    >>> coefficient(torch.tensor(4.0), 1.0)
    tensor(0.2500, dtype=torch.float64)
    """
    if math.isinf(max_norm):
        return torch.ones_like(norm, dtype=torch.float64)
    return (max_norm / (norm.to(torch.float64) + 1e-6)).clamp(max=1.0)


def global_norm(max_norm: float = 1.0, norm_type: float = 2.0) -> NormPolicy:
    """The standard: one fixed bound on the norm of the whole gradient.

    Args:
        max_norm: ≥ 0; `inf` measures and never clips.
        norm_type: p of the norm.

    Raises:
        ArgumentError: a negative or NaN bound, a norm type that is no number.

    >>> global_norm(1.0)
    NormPolicy(threshold=Fixed(max_norm=1.0), norm_type=2.0)
    """
    return NormPolicy(Fixed(max_norm), norm_type)
