"""Describe one step: `Outcome` for the engine and its observers, `Report` for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .devices import NEVER, Fact, host_reads_free, on_one_thread, outside_fake_mode
from .norms.lazy import lazy
from .norms.per_tensor import PerTensorPowers
from .norms.reduce import Totals
from .norms.tensor_norms import TensorNorms
from .sharding.shard import Shards

__all__ = ["Observer", "Outcome", "Report", "make_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """Measurements and decision of one call of a clipper, the same on every rank.

    The values are device scalars. The host reads none of them before `as_dict`.

    Args:
        norm: 0-d, total norm before clipping, float32 (float64 if some gradient is), without the loss scale.
        coef: 0-d float64, factor by which clipping changed the length of the whole gradient, 1 without clipping, above
            1 if a policy scaled it up. With one slot it is the coefficient itself; with several it is
            ‖(coefs · norms)‖ / ‖norms‖.
        clipped: 0-d bool, whether the policy changed the gradients.
        finite: 0-d bool, whether the norm and every watched scalar of every rank are finite; with on_nonfinite="zero",
            the norm is that of the remaining elements.
        skipped: 0-d bool, whether this step leaves parameters and optimizer unchanged. Step a scheduler that counts
            updates only if this is False.
        replicas_differ: 0-d bool, whether replicas of a gradient, or of a parameter that this step compared, differed
            between ranks; with replicas="repair", before the repair.
        norms: (slots,) float64, norm of each slot; `GradClipper.slots` has the names.
        coefs: (slots,) float64, coefficient of each slot.
        bounds: (slots,) float64, norm that the policy allowed each slot, inf without a bound. None for a policy that
            has no bounds.
        tensor_norms: (parameters,) float64, norm of each parameter's gradient, after `GradClipper.measure_tensors`;
            `GradClipper.tensors` has the names. None without it.
        update_rms: root mean square of g / √v with Adam's second moments v, with `update_clip` or after
            `GradClipper.measure_updates`: (parameters,) after `measure_tensors`, otherwise (slots,). NaN without second
            moments. Its square is the mean of g² / v. None without it.
        skips: (slots,) bool, groups that this step leaves unchanged, with isolate=True. None without it.
        watch: {name: 0-d} of the watched scalars of all ranks. NaN for a mean or a maximum that no rank has. None
            without watched scalars.
    """

    norm: Tensor
    coef: Tensor
    clipped: Tensor
    finite: Tensor
    skipped: Tensor
    replicas_differ: Tensor
    norms: Tensor
    coefs: Tensor
    bounds: Tensor | None = None
    tensor_norms: Tensor | None = None
    update_rms: Tensor | None = None
    skips: Tensor | None = None
    watch: Mapping[str, Tensor] | None = None

    @outside_fake_mode
    def as_dict(self) -> dict[str, float | bool]:
        """Return Python numbers for a log.

        Returns:
            {"norm", "coef", "clipped", "finite", "skipped"}, and the watched scalars by their names.

        Collectives: none. Host syncs: one per value. No other method has host syncs.
        """
        return {
            "norm": float(self.norm),
            "coef": float(self.coef),
            "clipped": bool(self.clipped),
            "finite": bool(self.finite),
            "skipped": bool(self.skipped),
            **{name: float(value) for name, value in (self.watch or {}).items()},
        }


# Not frozen, because a frozen dataclass takes three times as long to make, at every step.
@dataclass(eq=False)
class Outcome:
    """The decision about the gradients of one step, the same on every rank.

    Args:
        step: 1-based index of the clipper call.
        totals: sums by slot of the policy.
        coefs: (slots,) float64, coefficients; 1 where the step is skipped.
        skip: whether the step leaves everything unchanged.
        overflow: whether the gradients are not finite, so that a GradScaler lowers its scale.
        bounds: (slots,) float64, the norms that the policy allowed. None for a policy without bounds.
        limits: (low, high) to clamp elements to. None for no clamping.
        shards: gradients of this rank.
        per_tensor_powers: power sums of every gradient on this rank.
        measured: totals by measured slot, if these are finer than the policy's.
        tensor_norms: relation between measured slots and parameters. None without `GradClipper.measure_tensors`.
        replicas_differ: whether replicas differed when they were compared.
        skips: (slots,) bool, groups that skip the step. None unless the groups are isolated.
    """

    step: int
    totals: Totals
    coefs: Tensor
    skip: Fact
    overflow: Fact
    bounds: Tensor | None
    limits: tuple[float, float] | None
    shards: Shards
    per_tensor_powers: tuple[PerTensorPowers, ...]
    measured: Totals
    tensor_norms: TensorNorms | None = None
    replicas_differ: Fact = NEVER
    skips: Tensor | None = None

    @lazy
    def factors(self) -> Tensor:
        """Factors of the gradients, (measured slots,) or (1,): the coefficients without the loss scale."""
        scale = self.totals.loss_scale
        factors = self.coefs if scale is None else self.coefs / scale.to(self.coefs)
        if self.skips is not None and scale is not None:
            # A skipped group keeps its gradients, and these keep their loss scale.
            factors = torch.where(self.skips, 1.0, factors)
        if self.skip.host is None:
            # The device skips the step, and the host has not read whether it does.
            factors = self.skip.select(torch.ones_like(factors), factors)
        return factors if self.tensor_norms is None else self.tensor_norms.expand(factors)

    @lazy
    def is_scaled(self) -> Tensor:
        """0-d bool, true if any coefficient is not 1."""
        with on_one_thread(self.coefs.numel(), self.coefs.device):
            if not self.coefs.numel() or not host_reads_free(self.coefs.device):
                return self.coefs.ne(1.0).any()
            # This takes a fifth of the time on a CPU. With a NaN, both the minimum and the maximum are NaN, which is
            # not 1.
            least, most = self.coefs.aminmax()
            return least.ne(1.0) | most.ne(1.0)

    @property
    def scales_nothing(self) -> bool:
        """True if the host finds without a sync that each of several factors is 1."""
        # `scale_` looks at a single factor itself.
        if self.coefs.numel() == 1 or not host_reads_free(self.coefs.device) or self.factors is not self.coefs:
            return False
        return not self.is_scaled

    def without_gradients(self) -> Outcome:
        """Return a copy that keeps no gradient alive."""
        return replace(self, shards=Shards.of(()), per_tensor_powers=())

    @outside_fake_mode
    def report(self) -> Report:
        """Return the report for the user. Collectives: none. Host syncs: none."""
        return self._report

    @lazy
    def _report(self) -> Report:
        with on_one_thread(self.coefs.numel(), self.coefs.device):
            return self._make_report()

    def _make_report(self) -> Report:
        totals, coefs, device = self.totals, self.coefs, self.coefs.device
        coef = coefs[0] if coefs.numel() == 1 else None
        clipped = is_scaled = self.is_scaled if coef is None else coef.ne(1.0)
        # A non-finite group changes nothing, and must not hide the coefficient of the others.
        norms = totals.norms if self.skips is None else totals.norms.where(~self.skips, 0.0)
        if totals.out_of_limits.host is not False:
            clipped = clipped | (totals.out_of_limits & ~self.skip).on(device)
        return Report(
            norm=totals.as_user_dtype(),
            coef=_overall_coef(norms, coefs, totals.norm_type, is_scaled) if coef is None else coef,
            clipped=clipped,
            finite=totals.finite.on(device),
            skipped=self.skip.on(device),
            norms=totals.norms,
            coefs=coefs,
            bounds=self.bounds,
            tensor_norms=None if self.tensor_norms is None else self.tensor_norms.per_parameter(self.measured),
            update_rms=None if self.measured.update_powers is None else self.measured.update_rms,
            replicas_differ=self.replicas_differ.on(device),
            skips=self.skips,
            watch=totals.watch.values or None,
        )


def make_report(
    totals: Totals, coefs: Tensor, bounds: Tensor | None, skip: Tensor, finite: Tensor, *, has_fp64: bool
) -> Report:
    """Return the report of a step in a graph, where the host reads no values.

    Args:
        totals, coefs, bounds: see `Outcome`.
        skip: 0-d bool, whether the step leaves everything unchanged.
        finite: 0-d bool, whether the norm and all watched scalars are finite.
        has_fp64: whether some gradient is float64.
    """
    has_one_slot = len(coefs) == 1
    clipped = is_scaled = coefs.ne(1.0).any()
    if totals.out_of_limits.host is not False:
        clipped = clipped | (totals.out_of_limits.on(coefs.device) & ~skip)
    return Report(
        norm=totals.norm if has_fp64 else totals.norm.to(torch.float32),
        coef=coefs[0] if has_one_slot else _overall_coef(totals.norms, coefs, totals.norm_type, is_scaled),
        clipped=clipped,
        finite=finite,
        skipped=skip,
        replicas_differ=torch.zeros_like(skip),
        norms=totals.norms,
        coefs=coefs,
        bounds=bounds,
        watch=totals.watch.values,
    )


Observer: TypeAlias = Callable[[Outcome], None]
"""Function that is called with every outcome, before any gradient is written. It must not raise."""


def _overall_coef(norms: Tensor, coefs: Tensor, norm_type: float, is_scaled: Tensor) -> Tensor:
    """Return the factor of the length of the whole gradient, 1 where no coefficient scales anything."""
    if host_reads_free(coefs.device) and not bool(is_scaled):
        return coefs.new_ones(())
    before = torch.linalg.vector_norm(norms, norm_type)
    after = torch.linalg.vector_norm(norms * coefs, norm_type)
    return torch.where(~is_scaled | (before == 0), 1.0, after / before)
