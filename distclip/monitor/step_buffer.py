"""The steps since the last write, as device scalars, and their one copy to the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..norms.kernels.torch_ops import combine
from ..norms.measure import PerTensorPowers
from ..outcome import Outcome

__all__ = ["Step", "read"]

VECTORS = ("norms", "tensor_norms")
"""Fields that are lists; all others are one number, whatever its shape."""


@dataclass(slots=True)
class Step:
    """One step, as it was seen on this rank.

    Args:
        number: which call of the clipper.
        numbers: by field of a line, tensors of any dtype, the same on every rank.
        power_sum: 0-d, of the whole gradient, with the loss scale in it.
        each: what this rank measured of each of its gradients, likewise.
        noted: by the user, numbers or 0-d tensors.
        ids: of this rank's samples.
        time: seconds since 1970.
    """

    number: int
    numbers: dict[str, Tensor]
    power_sum: Tensor
    each: tuple[PerTensorPowers, ...]
    noted: dict[str, Any] = field(default_factory=dict)
    ids: Any = ()
    time: float = field(default_factory=time.time)

    @classmethod
    def of(cls, outcome: Outcome, slots: bool) -> Step:
        """What is to be kept of a decision; no gradient is.

        Args:
            outcome: of that step.
            slots: whether to keep the norm of every slot.
        """
        report, totals = outcome.report(), outcome.totals
        numbers = {
            "norm": totals.norm,
            "coef": report.coef,
            "clipped": report.clipped,
            "finite": report.finite,
            "skipped": report.skipped,
        }
        if report.bounds is not None and len(report.bounds) == 1:
            numbers["bound"] = report.bounds[0]
        if totals.loss_scale is not None:
            numbers["scale"] = totals.loss_scale.clone()  # a scaler writes its next one into the same tensor
        if slots:
            numbers["norms"] = report.norms
        if report.tensor_norms is not None:
            numbers["tensor_norms"] = report.tensor_norms
        power_sum = combine(totals.powers, totals.norm_type)
        return cls(outcome.step, numbers, power_sum, outcome.per_tensor_powers)

    def ids_on_host(self) -> list[Any]:
        """As Python's own numbers or strings."""
        ids = self.ids
        return ids.reshape(-1).tolist() if hasattr(ids, "tolist") else list(ids)

    def largest(self) -> tuple[str, float] | None:
        """The name and power sum of the largest gradient that is on this rank; None where it has none.

        Host syncs: one for each of `each`.
        """
        best = None
        for names, powers in self.each:
            if names:
                of_each = powers.view(len(names), -1).sum(1)
                power, at = of_each.max(0)
                if best is None or float(power) > best[1]:
                    best = names[int(at)], float(power)
        return best

    def power_here(self) -> float:
        """The power sum of all that is on this rank."""
        return sum(float(powers.sum()) for names, powers in self.each if names)


def read(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """By step, its numbers and what was noted of it, on the host.

    Host syncs: one, whatever the number of steps; one more for each device beside the norms' from which something was
    noted.
    """
    columns: dict[tuple[str, torch.dtype, torch.device, torch.Size], list[tuple[int, Tensor]]] = {}
    rows: list[dict[str, Any]] = [{} for _ in steps]
    for i, step in enumerate(steps):
        for key, value in {**step.numbers, **step.noted}.items():
            if isinstance(value, Tensor):
                columns.setdefault((key, value.dtype, value.device, value.shape), []).append((i, value))
            else:
                rows[i][key] = value
    for device in {kind[2] for kind in columns}:
        here = {kind: column for kind, column in columns.items() if kind[2] == device}
        stacked = [torch.stack([value for _, value in column]).double().reshape(-1) for column in here.values()]
        host = iter(torch.cat(stacked).tolist())
        for (key, dtype, _, shape), column in here.items():
            for i, _ in column:
                one = list(islice(host, max(1, shape.numel())))
                rows[i][key] = bool(one[0]) if dtype == torch.bool else one if key in VECTORS else one[0]
    return rows
