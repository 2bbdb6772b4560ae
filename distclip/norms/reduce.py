"""Partials → Totals: one all-reduce over everybody concerned, whatever the meshes and however many the slots.

Besides the numbers themselves the ranks must learn three facts of each other: that somebody cannot go on as usual
(`stop`), that somebody's gradients are float64 (`wide`), that somebody's elements lie outside of a policy's bounds
(`outside`). They travel in the same buffer, so that no rank ever has to decide alone whether there will be another
collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ..comm import Comm
from ..devices import host_reads_free
from .kernels.torch_ops import combine
from .measure import Partials

__all__ = ["Flag", "Totals", "reduce"]

Flag: TypeAlias = Tensor | float
"""A count of ranks, or a bool: on an accelerator 0-d, so that the host need not wait for it."""

_FLAG = 1 << 17
"""Flags are counts of ranks packed into one float64 beside the sum: three times 17 bits, up to 131,071 ranks."""


@dataclass(frozen=True)
class Totals:
    """What all ranks know after the reduction, the same bits on each.

    Args:
        value: (slots,) float64: Σ|g|^p over the whole gradient of each slot, or its max|g| (−min|g|).
        norm_type: p.
        stop: how many ranks (for p = ±inf: whether any) cannot go on as usual: they failed, came with a mesh that
            reaches further, or hold summands that are not in `value`. On a CPU a number, elsewhere 0-d, as those below.
        wide: likewise: have float64 gradients.
        outside: likewise: have elements outside of the policy's bounds.
        weight: (slots,) float64: the same of the parameters themselves, where the policy asked for it.
        loss_scale: 0-d, what the gradients are multiplied by (a GradScaler's); norms are free of it. None for 1.
    """

    value: Tensor
    norm_type: float
    stop: Flag
    wide: Flag
    outside: Flag
    weight: Tensor | None = None
    loss_scale: Tensor | None = None

    @cached_property
    def norms(self) -> Tensor:
        r"""The root of each slot, :math:`(\sum |g|^p)^{1/p}`, (slots,) float64; for p = 0 how many are not zero.

        >>> Totals(torch.tensor([25.0, 1.0]), 2.0, 0, 0, 0).norms
        tensor([5., 1.])
        """
        return self._free(_root(self.value, self.norm_type))

    @cached_property
    def norm(self) -> Tensor:
        """The norm of the whole gradient: of all slots together, 0-d float64."""
        if len(self.value) == 1:
            return self.norms[0]
        return self._free(_root(combine(self.value, self.norm_type), self.norm_type))

    @cached_property
    def weight_norms(self) -> Tensor:
        """Of the parameters, for a policy with `needs_weights`: (slots,) float64."""
        assert self.weight is not None, "a policy has to say needs_weights = True"
        return _root(self.weight, self.norm_type)

    @cached_property
    def finite(self) -> Tensor:
        """0-d bool: no element is NaN or infinite, and no power sum is beyond float64."""
        finite = self.value.isfinite()
        return finite[0] if len(finite) == 1 else finite.all()

    def _free(self, norm: Tensor) -> Tensor:
        return norm if self.loss_scale is None else norm / self.loss_scale.to(norm)


def _root(power_sum: Tensor, norm_type: float) -> Tensor:
    if norm_type == -math.inf:
        return -power_sum
    if norm_type in (math.inf, 1.0, 0.0):
        return power_sum
    return power_sum.sqrt() if norm_type == 2 else power_sum.pow(1.0 / norm_type)


def reduce(partials: Partials, norm_type: float, comm: Comm, *, stop: bool = False) -> Totals:
    """Add up, or take the maximum of, what every rank of the communicator measured.

    Args:
        partials: of this rank.
        norm_type: p, the same on every rank.
        comm: everybody concerned.
        stop: this rank cannot go on as usual, and the others must know.

    Collectives: one all-reduce over `comm`, of slots + 1 float64 numbers for a finite p and of 2 slots + 3 for ±inf
    (with weights: twice as many slots); none for a communicator of one rank. Host syncs: none.
    """
    value, slots, outside = partials.value, len(partials.value), partials.outside
    on_host = host_reads_free(value.device)
    flags: list[Flag] = [stop, partials.wide, bool(outside) if on_host or outside is None else outside]
    if comm.size == 1:
        return Totals(value, norm_type, flags[0], flags[1], flags[2], partials.weight)
    values = value if partials.weight is None else torch.cat([value, partials.weight])
    n = len(values)
    if math.isinf(norm_type):
        # A maximum over ranks may lose a NaN, depending on who comes first: it travels as a flag.
        buffer = values.new_empty(2 * n + 3)
        nan = values.isnan()
        buffer[:n], buffer[n : 2 * n] = values.masked_fill(nan, -math.inf), nan
        for i, flag in enumerate(flags):
            buffer[2 * n + i] = flag
        comm.max_(buffer)
        values, told = buffer[:n].masked_fill(buffer[n : 2 * n] > 0, math.nan), buffer[2 * n :]
        flags = told.tolist() if on_host else list(told.unbind())
    else:
        packed: Flag = sum(flag * _FLAG**i for i, flag in enumerate(flags))
        last = packed.to(values.dtype).view(1) if isinstance(packed, Tensor) else values.new_full((1,), packed)
        buffer = torch.cat([values, last])
        comm.sum_(buffer)
        values = buffer[:n]
        packed = buffer.tolist()[n] if on_host else buffer[n]
        flags = [packed // _FLAG**i % _FLAG for i in range(3)]
    weight = None if partials.weight is None else values[slots:]
    return Totals(values[:slots], norm_type, flags[0], flags[1], flags[2], weight)
