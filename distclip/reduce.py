"""Partials → Totals: one all-reduce over everybody concerned, whatever the meshes.

Besides the number itself the ranks must learn three facts of each other: that somebody cannot go on as usual (`stop`),
that somebody's gradients are float64 (`wide`), that somebody's elements lie outside of a policy's bounds (`outside`).
They travel in the same buffer, so that no rank ever has to decide alone whether there will be another collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .comm import Comm, LocalComm
from .measure import Partials

__all__ = ["Totals", "reduce"]

_FLAG = 1 << 17
"""Flags are counts of ranks packed into one float64 beside the sum: three times 17 bits, up to 131,071 ranks."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What all ranks know after the reduction, the same bits on each.

    Args:
        value: 0-d float64: Σ|g|^p over the whole gradient, or its max|g| (−min|g|).
        norm_type: p.
        stop: 0-d, how many ranks (for p = ±inf: whether any) cannot go on as usual: they failed, came with a mesh that
            reaches further, or hold summands that are not in `value`.
        wide: 0-d, likewise: have float64 gradients.
        outside: 0-d, likewise: have elements outside of the policy's bounds.
    """

    value: Tensor
    norm_type: float
    stop: Tensor
    wide: Tensor
    outside: Tensor

    @property
    def norm(self) -> Tensor:
        r"""The root, :math:`(\sum |g|^p)^{1/p}`, 0-d float64; for p = 0 the number of non-zero elements.

        >>> Totals(torch.tensor(25.0), 2.0, *torch.zeros(3)).norm
        tensor(5.)
        """
        if self.norm_type == -math.inf:
            return -self.value
        if self.norm_type in (math.inf, 1.0, 0.0):
            return self.value
        return self.value.sqrt() if self.norm_type == 2 else self.value.pow(1.0 / self.norm_type)


def reduce(partials: Partials, norm_type: float, comm: Comm, *, stop: bool = False) -> Totals:
    """Add up, or take the maximum of, what every rank of the communicator measured.

    Args:
        partials: of this rank.
        norm_type: p, the same on every rank.
        comm: everybody concerned.
        stop: this rank cannot go on as usual, and the others must know.

    Collectives: one all-reduce over `comm`, of two float64 numbers for a finite p and of five for ±inf; none for
    `LocalComm`. Host syncs: none.
    """
    value = partials.value
    known = torch.tensor([stop, partials.wide], dtype=value.dtype, device=value.device)
    flags = torch.cat([known, partials.outside.to(value.dtype).view(1)])
    if isinstance(comm, LocalComm):
        return Totals(value, norm_type, *flags)
    if math.isinf(norm_type):
        # A maximum over ranks may lose a NaN, depending on who comes first: it travels as a flag.
        nan = value.isnan()
        buffer = torch.cat([torch.stack([torch.where(nan, -math.inf, value), nan.to(value.dtype)]), flags])
        comm.max_(buffer)
        return Totals(torch.where(buffer[1] > 0, math.nan, buffer[0]), norm_type, *buffer[2:])
    weights = torch.tensor([1.0, _FLAG, _FLAG * _FLAG], dtype=value.dtype, device=value.device)
    buffer = torch.stack([value, flags.dot(weights)])
    comm.sum_(buffer)
    return Totals(buffer[0], norm_type, *((buffer[1] / weights).floor() % _FLAG))
