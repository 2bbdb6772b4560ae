"""Buffer the steps since the last write as device scalars, and copy them to the host at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..norms.kernels.torch_ops import combine
from ..norms.per_tensor import PerTensorPowers
from ..outcome import Outcome

__all__ = ["VECTORS", "Step", "read_steps"]

VECTORS = ("norms", "tensor_norms")
"""Fields that are vectors. All other fields are single numbers."""


@dataclass(slots=True)
class Step:
    """The numbers of one step on this rank.

    Args:
        number: 1-based index of the clipper call.
        numbers: tensors of any dtype by field of a line, equal on every rank.
        power_sum: 0-d power sum of the whole gradient, with the loss scale in it.
        per_tensor_powers: local power sums of this rank's gradients, with the loss scale in them.
        notes: numbers or 0-d tensors of the user, by field of a line.
        ids: ids of this rank's samples, a tuple or a 1-D tensor.
        time: seconds since 1970.
        is_undone: whether an error ended the step before the optimizer made it. Such a step is not written.
    """

    number: int
    numbers: dict[str, Tensor]
    power_sum: Tensor
    per_tensor_powers: tuple[PerTensorPowers, ...]
    notes: dict[str, Any] = field(default_factory=dict)
    ids: Any = ()
    time: float = field(default_factory=time.time)
    is_undone: bool = False

    @classmethod
    def of(cls, outcome: Outcome, with_slots: bool) -> Step:
        """Keep the numbers of an outcome, without references to gradients.

        Args:
            outcome: outcome of the step.
            with_slots: whether to keep the norm of every slot.
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
            numbers["scale"] = totals.loss_scale.clone()  # a scaler writes its next scale into the same tensor
        if with_slots:
            numbers["norms"] = report.norms
        if report.tensor_norms is not None:
            numbers["tensor_norms"] = report.tensor_norms
        if report.update_rms is not None:
            # A line has one number, and the index of its slot or tensor.
            known = report.update_rms.nan_to_num(-1.0)
            largest, index = known.max(0)
            numbers["update_rms"] = largest.where(largest >= 0, torch.nan)
            numbers["update_slot"] = index
        power_sum = combine(totals.powers, totals.norm_type)
        return cls(outcome.step, numbers, power_sum, outcome.per_tensor_powers)

    def read_ids(self) -> list[Any]:
        """Return the ids as numbers or strings of Python."""
        return list(self.ids.tolist() if isinstance(self.ids, Tensor) else self.ids)

    def largest_gradient(self) -> tuple[str, float] | None:
        """Return the name and the power sum of this rank's largest gradient, or None if the rank has none.

        Host syncs: one or two per entry of `per_tensor_powers`.
        """
        largest = None
        for one in self.per_tensor_powers:
            if one.names:
                power, index = one.sums().max(0)
                if largest is None or float(power) > largest[1]:
                    largest = one.names[int(index)], float(power)
        return largest

    def local_power(self) -> float:
        """Return the power sum of all gradients on this rank."""
        return sum(float(one.powers.sum()) for one in self.per_tensor_powers)


def read_steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Copy the numbers and the notes of each step to the host. Vectors are tensors of float64.

    A note that can no longer be read is left out, with a warning.

    Host syncs: one for any number of steps, and one for each additional device with notes.
    """
    try:
        return _read([{**step.numbers, **step.notes} for step in steps])
    except Exception:
        # A noted tensor was modified or freed in the meantime. The other ranks are about to add up losses, so this rank
        # must too.
        rows = _read([step.numbers for step in steps])
        for step, row in zip(steps, rows, strict=True):
            for key, value in step.notes.items():
                with _warning_about(key, step.number):
                    row |= _read([{key: value}])[0]
        return rows


@contextmanager
def _warning_about(key: str, step: int) -> Iterator[None]:
    """Warn about an exception instead of raising it."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"recorder: {key} of step {step} cannot be read any more: {type(error).__name__}: {error}. Note tensors "
            "that are not modified afterwards.",
            RuntimeWarning,
            stacklevel=2,
        )


def _read(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy the tensors of each step to the host, all of one device at once."""
    # Tensors of one field, dtype, device and shape can be stacked; one copy per device then reads all of them.
    columns: dict[tuple[str, torch.dtype, torch.device, torch.Size], list[tuple[int, Tensor]]] = {}
    rows: list[dict[str, Any]] = [{} for _ in values]
    for i, fields in enumerate(values):
        for key, value in fields.items():
            if isinstance(value, Tensor):
                columns.setdefault((key, value.dtype, value.device, value.shape), []).append((i, value))
            else:
                rows[i][key] = value
    for device in {kind[2] for kind in columns}:
        on_device = {kind: column for kind, column in columns.items() if kind[2] == device}
        stacked = [torch.stack([value for _, value in column]).double().reshape(-1) for column in on_device.values()]
        parts = torch.split(torch.cat(stacked).cpu(), [part.numel() for part in stacked])
        for ((key, dtype, _, shape), column), part in zip(on_device.items(), parts, strict=True):
            if key in VECTORS:
                numbers: Iterable[Any] = part.view(len(column), shape.numel())
            else:
                numbers = (part.bool() if dtype == torch.bool else part).tolist()
            for (i, _), value in zip(column, numbers, strict=True):
                rows[i][key] = value
    return rows
