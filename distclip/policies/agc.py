"""A bound relative to the parameters themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .policy import State
from .validation import POSITIVE, take

__all__ = ["RelativeToWeight"]


@dataclass(frozen=True, slots=True)
class RelativeToWeight:
    r"""A fraction of the norm of the weights that the gradient is of.

    .. math:: bound_s = ratio \cdot \max(\lVert w_s \rVert, \varepsilon)

    Args:
        ratio: > 0.
        eps: ε, > 0: weights that start at zero would otherwise never leave it.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization",
    ICML 2021, arXiv 2102.06171, equation 3.

    >>> RelativeToWeight(0.02)
    RelativeToWeight(ratio=0.02, eps=0.001)
    """

    needs_weights: ClassVar[bool] = True

    ratio: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        take(self, ratio=POSITIVE, eps=POSITIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing to remember."""
        return {}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """The bound, whatever the norms of the gradient."""
        return self.ratio * totals.weight_norms.clamp(min=self.eps), state
