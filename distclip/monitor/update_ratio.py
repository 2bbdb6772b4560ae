r"""How far a step moves the parameters: about 1e-3 of their norm, where training is healthy."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..clipper import GradClipper
from ..norms.measure import measure
from ..norms.reduce import reduce
from ..norms.spec import NormSpec
from ..sharding.shard import Shards

__all__ = ["UpdateRatio"]


class UpdateRatio:
    r"""The norm of what a step changes, over the norm of what was there, right in any layout.

    .. math:: \frac{\|w_{t+1} - w_t\|_2}{\|w_t\|_2}

    It holds a copy of this rank's pieces of the parameters during the step: for every so-manieth step, rather than for
    all. Not for an engine of DeepSpeed, whose parameters are elsewhere.

    Args:
        clipper: of these parameters.

    Collectives: use it on every rank; at the end of the block one all-reduce of 2 · slots + 1 float64 numbers, none
    where the block raised. Host syncs: none.

    >>> import distclip
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> clipper = distclip.GradClipper([weight], distclip.global_norm(1.0))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> weight.grad = torch.tensor([0.0, 1.0])
    >>> with UpdateRatio(clipper) as update:
    ...     report = clipper.step(optimizer)
    >>> update.ratio  # a number for recorder.note(update_ratio=update.ratio)
    tensor(0.0200, dtype=torch.float64)
    """

    def __init__(self, clipper: GradClipper) -> None:
        self.ratio: Tensor = torch.tensor(torch.nan, dtype=torch.float64)
        """0-d float64 on the parameters' device, of the last block; NaN before."""
        self._clipper = clipper
        self._before: Shards = Shards.of(())

    @torch.no_grad()
    def __enter__(self) -> UpdateRatio:
        now = self._clipper.pieces()
        self._before = Shards(now.infos, [piece.clone() for piece in now.grads])
        return self

    @torch.no_grad()
    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        before, self._before = self._before, Shards.of(())
        if error is not None:
            return
        now = self._clipper.pieces()
        device = now.grads[0].device if now.grads else torch.device("cpu")
        moved = Shards(now.infos, [new - old for new, old in zip(now.grads, before.grads, strict=True)])
        spec = NormSpec(needs_weights=True)
        partials = measure(moved, spec, device, self._clipper.measured_slots, before)
        totals = reduce(partials, spec, self._clipper.comm, read_facts=False)
        self.ratio = totals.norm / torch.linalg.vector_norm(totals.weight_norms)
