"""`Decision`: what is to happen to the gradients of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from .call import Measured
from .norms.by_tensor import ByTensor
from .report import Report
from .sharding.shard import Shards

__all__ = ["Observer", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What is to happen to the gradients of one step.

    Args:
        measured: the gradients and their totals.
        coefs: (slots,) float64; 1 where the step is skipped.
        limits: (low, high) of the elements; None for none.
        skip: 0-d bool, whether the step leaves everything as it is.
        skip_known: the same on the host; None where the host has not waited for it.
        overflow: 0-d bool, whether that is because something is not finite.
        bounds: (slots,) float64, the norms that the policy allowed.
        by_tensor: what belongs to which parameter, if that is measured beside what the policy asks for.
    """

    measured: Measured
    coefs: Tensor
    limits: tuple[float, float] | None
    skip: Tensor
    skip_known: bool | None
    overflow: Tensor
    bounds: Tensor | None = None
    by_tensor: ByTensor | None = None

    @cached_property
    def factors(self) -> Tensor:
        """(measured slots,), or (1,): what gradients are multiplied by: the coefficients, free of a loss scale."""
        scale = self.measured.totals.loss_scale
        factors = self.coefs if scale is None else self.coefs / scale.to(self.coefs)
        factors = factors if self.skip_known is not None else torch.where(self.skip, 1.0, factors)
        return factors if self.by_tensor is None else self.by_tensor.spread(factors)

    def without_gradients(self) -> Outcome:
        """The same, without keeping gradients alive."""
        return replace(self, measured=replace(self.measured, shards=Shards.of(()), each=()))

    def report(self) -> Report:
        """For the caller."""
        return self._report

    @cached_property
    def _report(self) -> Report:
        totals, coefs, outside = self.measured.totals, self.coefs, self.measured.outside
        one = len(coefs) == 1
        clipped = (coefs[0] if one else coefs).ne(1.0).any()
        return Report(
            norm=self.measured.presented(),
            coef=coefs[0] if one else _shortening(totals.norms, coefs, totals.norm_type),
            clipped=clipped if outside is False else clipped | (outside & ~self.skip),
            finite=totals.finite,
            skipped=self.skip,
            norms=totals.norms,
            coefs=coefs,
            bounds=self.bounds,
            tensor_norms=self._tensor_norms(),
        )

    def _tensor_norms(self) -> Tensor | None:
        fine = self.measured.fine
        return None if fine is None or self.by_tensor is None else self.by_tensor.norms(fine)


Observer: TypeAlias = Callable[[int, Outcome], None]
"""Is told of every decision, with the number of its step, before any gradient is written. Raises nothing."""


def _shortening(norms: Tensor, coefs: Tensor, norm_type: float) -> Tensor:
    """By what the whole gradient is shorter, 1 where nothing is clipped."""
    before = torch.linalg.vector_norm(norms, norm_type)
    after = torch.linalg.vector_norm(norms * coefs, norm_type)
    return torch.where((coefs == 1).all() | (before == 0), 1.0, after / before)
