"""Report: what happened in one call, as device scalars."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What one call of a clipper saw and did, the same on every rank. Reading it is free until `as_dict`.

    Args:
        norm: 0-d, the total norm before clipping, float32 (float64 if some gradient is); free of a loss scale.
        coef: 0-d float64, by what clipping shortened the whole gradient; 1 where nothing was. With one slot, the factor
            itself; with several, ‖(coefs · norms)‖ / ‖norms‖.
        clipped: 0-d bool, whether the policy changed the gradients.
        finite: 0-d bool, whether the norm is; with on_nonfinite="zero", of what is left.
        skipped: 0-d bool, whether this step leaves parameters and optimizer as they are. A scheduler that is to count
            updates only is stepped where this is False.
        norms: (slots,) float64, the norm of each slot; `GradClipper.slots` has the names.
        coefs: (slots,) float64, the factor of each.
        bounds: (slots,) float64, the norm that the policy allowed each, inf where any; None for a policy that has none.
        tensor_norms: (parameters,) float64, after `GradClipper.measure_tensors`: the norm of each parameter's gradient;
            `GradClipper.tensors` has the names. None without.
    """

    norm: Tensor
    coef: Tensor
    clipped: Tensor
    finite: Tensor
    skipped: Tensor
    norms: Tensor
    coefs: Tensor
    bounds: Tensor | None = None
    tensor_norms: Tensor | None = None

    def as_dict(self) -> dict[str, float | bool]:
        """Python numbers for a log: {"norm", "coef", "clipped", "finite", "skipped"}.

        Collectives: none. Host syncs: one per value; the only place that has any.
        """
        return {
            "norm": float(self.norm),
            "coef": float(self.coef),
            "clipped": bool(self.clipped),
            "finite": bool(self.finite),
            "skipped": bool(self.skipped),
        }
