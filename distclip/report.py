"""Report: what happened in one call, as device scalars."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What one call of a clipper saw and did, the same on every rank. Reading it is free until `as_dict`.

    Args:
        norm: 0-d, the total norm before clipping, float32 (float64 if some gradient is).
        coef: 0-d float64, what the gradients were multiplied by; 1 where nothing was.
        clipped: 0-d bool, whether the policy changed the gradients.
        finite: 0-d bool, whether the norm is.
    """

    norm: Tensor
    coef: Tensor
    clipped: Tensor
    finite: Tensor

    def as_dict(self) -> dict[str, float | bool]:
        """Python numbers for a log: {"norm", "coef", "clipped", "finite"}.

        Collectives: none. Host syncs: one per value; the only place that has any.
        """
        return {
            "norm": float(self.norm),
            "coef": float(self.coef),
            "clipped": bool(self.clipped),
            "finite": bool(self.finite),
        }
