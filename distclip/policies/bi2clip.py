"""Limit the magnitudes of elements from above and below: BiClip, the operator of Bi²Clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from .policy import State, Verdict
from .validation import NOT_NEGATIVE, convert_fields

__all__ = ["BiClip", "bi2clip"]


@dataclass(frozen=True, slots=True)
class BiClip:
    r"""Clamp the magnitude of every element to [low, high], and keep its sign. An element of 0 stays 0.

    .. math:: g_i' = \mathrm{sgn}(g_i) \min(\max(|g_i|, low), high)

    The report still contains the Euclidean norm of the whole gradient.

    Args:
        low: smallest magnitude of an element that is not 0, ≥ 0. With 0, nothing is scaled up.
        high: largest magnitude, ≥ `low`.

    Raises:
        ArgumentError: a negative limit, one that is not a number, or a lower limit above the upper one.

    >>> BiClip(0.25, 0.5).spec.limits
    (0.25, 0.5)
    """

    low: float = 1e-4
    high: float = 1.0

    def __post_init__(self) -> None:
        convert_fields(self, low=NOT_NEGATIVE, high=NOT_NEGATIVE)
        if self.low > self.high:
            raise ArgumentError(
                f"low={self.low}: it is above high={self.high}. Pass the lower limit first, as in bi2clip(1e-4, 1.0)."
            )

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs: the norm of the whole model, and the limits of the magnitudes."""
        return NormSpec(limits=(self.low, self.high), limits_magnitudes=True)

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty state."""
        return {}

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the limits, which are constant, with coefficients of 1."""
        return Verdict(torch.ones_like(totals.norms), limits=(self.low, self.high)), state

    def mask_valid(self, state: State) -> dict[str, torch.Tensor]:
        """Return no masks, because there is no state."""
        return {}


def bi2clip(low: float = 1e-4, high: float = 1.0) -> BiClip:
    r"""Clamp the magnitude of every element to [low, high], which scales small elements up. Zeros stay 0.

    .. math:: g_i' = \mathrm{sgn}(g_i) \min(\max(|g_i|, low), high)

    If the limits are close to each other, the step approaches that of sign descent. Bi²Clip applies the operator twice:
    to the gradients of the inner optimizer, and to the pseudo-gradients of the outer one (DiLoCo). Make one clipper for
    each. The defaults are examples. The source tunes both limits for each task.

    Args:
        low: smallest magnitude of an element that is not 0, ≥ 0.
        high: largest magnitude, ≥ `low`.

    Raises:
        ArgumentError: see `BiClip`.

    Source: Lee, Zaheer, Li, "Efficient distributed optimization under heavy-tailed noise" (TailOPT), ICML 2025,
    arXiv 2502.04164.

    >>> bi2clip(0.25, 0.5)
    BiClip(low=0.25, high=0.5)
    """
    return BiClip(low, high)
