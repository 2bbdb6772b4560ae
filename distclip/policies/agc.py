"""Bound the gradient's norm relative to the norm of the parameters: AGC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import POSITIVE, convert_fields

__all__ = ["RelativeToWeight", "agc"]


def agc(
    ratio: float = 0.01, eps: float = 1e-3, exclude: str | Sequence[str] = (), norm_type: float = 2.0
) -> NormPolicy:
    r"""Clip each row of a gradient relative to the same row of the weights (adaptive gradient clipping).

    .. math:: coef_i = \min\left(1, ratio \frac{\max(\lVert w_i \rVert, \varepsilon)}{\lVert g_i \rVert}\right)

    A row is an index along dim 0, an output unit of a linear layer or a convolution. A parameter with a single dim is
    one row.

    Args:
        ratio: largest ratio of the two norms, > 0.
        eps: ε, > 0. Without it weights that start at zero would stay there.
        exclude: a regular expression that is searched in parameter names, or several. Parameters with a match are not
            clipped. The paper excludes the final linear layer.
        norm_type: p of both norms.

    Raises:
        ArgumentError: a number outside of its range, a norm type that is not a number, or an invalid regular
            expression.

    Source: Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization",
    ICML 2021, arXiv 2102.06171, equation 3.

    >>> agc(exclude=["head"]).threshold
    RelativeToWeight(ratio=0.01, eps=0.001)
    """
    return NormPolicy(RelativeToWeight(ratio, eps), norm_type, per="row", exclude=exclude)


@dataclass(frozen=True, slots=True)
class RelativeToWeight(Rule):
    r"""Threshold of `agc`, for any granularity.

    .. math:: bound_s = ratio \cdot \max(\lVert w_s \rVert, \varepsilon)

    Args:
        ratio, eps: see `agc`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> RelativeToWeight(0.02)
    RelativeToWeight(ratio=0.02, eps=0.001)
    """

    needs_weights = True

    ratio: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        convert_fields(self, ratio=POSITIVE, eps=POSITIVE)

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty state."""
        return {}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bounds, which do not depend on the norms of the gradient."""
        return totals.weight_norms.clamp(min=self.eps).mul_(self.ratio), state
