r"""Measure how far a step moves the parameters: about 1e-3 of their norm in a healthy run."""

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
    r"""Measures the norm of a step's update relative to the norm of the parameters, in any layout.

    .. math:: \frac{\|w_{t+1} - w_t\|_2}{\|w_t\|_2}

    It keeps a copy of this rank's parameters during the step, so use it for some steps only. It does not work with a
    DeepSpeed engine, which updates other tensors than the model's parameters.

    Args:
        clipper: clipper of these parameters.

    Collectives: use it on every rank. The end of the block has one all-reduce of 2 · slots + 1 float64 numbers, or none
    if the block raised. Host syncs: none.

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
        """0-d float64 ratio of the last block, on the parameters' device. It is NaN before the first block."""
        self._clipper = clipper
        self._before: Shards = Shards.of(())

    @torch.no_grad()
    def __enter__(self) -> UpdateRatio:
        weights = self._clipper.pieces()
        self._before = Shards(weights.infos, [piece.clone() for piece in weights.grads])
        return self

    @torch.no_grad()
    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        before, self._before = self._before, Shards.of(())
        if error is not None:
            return
        after = self._clipper.pieces()
        device = after.grads[0].device if after.grads else torch.device("cpu")
        updates = Shards(after.infos, [new - old for new, old in zip(after.grads, before.grads, strict=True)])
        # The updates are measured like gradients, and the parameters before the step as their weights.
        spec = NormSpec(needs_weights=True)
        partials = measure(updates, spec, device, self._clipper.measured_slots, before)
        totals = reduce(partials, spec, self._clipper.comm, read_facts=False)
        self.ratio = totals.norm / torch.linalg.vector_norm(totals.weight_norms)
