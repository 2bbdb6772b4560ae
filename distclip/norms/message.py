"""Declare the buffer of the one all-reduce, field by field: what a rank writes, and what all ranks read.

A call has a single all-reduce, so all fields are combined by one operation. It is a sum for a finite p and a maximum
for p = ±inf. To add a field, add a line to `FIELDS` or `FACTS` here, an attribute to `Partials` for its writer, and an
attribute of the same name to `Totals` for its reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Comm
from ..devices import Fact, as_fact, device_constant
from .measure import Partials
from .spec import NormSpec

__all__ = ["FACTS", "FIELDS", "FactField", "Field", "all_reduce_", "pack", "unpack_facts", "unpack_fields"]


@dataclass(frozen=True, slots=True)
class Field:
    """One vector of the message, with an element per slot.

    Args:
        name: attribute of `Totals` that it becomes.
        write: this rank's value, (slots,).
        included: whether a call has the field; it must depend on the spec alone, which all ranks share.
    """

    name: str
    write: Callable[[Partials], Tensor | None]
    included: Callable[[NormSpec], bool] = lambda spec: True


@dataclass(frozen=True, slots=True)
class FactField:
    """One bool per rank, of which all ranks learn whether it holds on any of them.

    Args:
        name: attribute of `Totals` that it becomes, a `Fact`.
        write: this rank's value, a bool or a 0-d bool tensor.
    """

    name: str
    write: Callable[[Partials], Tensor | bool]


FIELDS = (
    Field("powers", lambda partials: partials.powers),
    Field("weight_powers", lambda partials: partials.weight_powers, lambda spec: spec.needs_weights),
)
"""Vectors of the message, in order."""

FACTS = (
    FactField("failed", lambda partials: partials.failed),
    FactField("uncovered", lambda partials: partials.uncovered),
    FactField("has_partial_grads", lambda partials: partials.has_partial_grads),
    FactField("has_fp64", lambda partials: partials.has_fp64),
    FactField("out_of_limits", lambda partials: partials.out_of_limits),
)
"""Facts of the message, in order. They follow the vectors, one number each."""


def pack(partials: Partials, spec: NormSpec) -> Tensor:
    """Write the message of this rank.

    Args:
        partials: of this rank.
        spec: the norm that was measured, the same on all ranks.

    Returns:
        1-D float64 buffer on the device of the power sums.

    Host syncs: none.
    """
    like = partials.powers
    vectors = [vector for field in FIELDS if field.included(spec) and (vector := field.write(partials)) is not None]
    facts = [fact.write(partials) for fact in FACTS]
    known = tuple(0.0 if isinstance(fact, Tensor) else float(fact) for fact in facts)
    # The facts of an ordinary step are the same every time, so that they are on the device already.
    tail = device_constant(known, like.device, like.dtype)
    if any(isinstance(fact, Tensor) for fact in facts):
        tail = torch.stack([torch.as_tensor(fact, dtype=like.dtype, device=like.device) for fact in facts])
    return torch.cat([*vectors, tail])


def all_reduce_(buffer: Tensor, spec: NormSpec, comm: Comm) -> Tensor:
    """Combine the messages of all ranks.

    Args:
        buffer: message of this rank. It is overwritten.
        spec: the norm that was measured; its p decides between a sum and a maximum.
        comm: the ranks that take part.

    Returns:
        The combined message, the same bits on every rank.

    Collectives: one all-reduce over `comm`. Host syncs: none.
    """
    if not math.isinf(spec.norm_type):
        comm.sum_(buffer)
        return buffer
    # A maximum over ranks may drop a NaN, depending on the order of the ranks. So NaN is replaced by the neutral -inf,
    # and a second half of the buffer marks where it was.
    nan = buffer.isnan()
    halves = torch.cat([buffer.masked_fill(nan, -math.inf), nan.to(buffer.dtype)])
    comm.max_(halves)
    n = len(buffer)
    return halves[:n].masked_fill(halves[n:] > 0, math.nan)


def unpack_fields(buffer: Tensor, num_slots: int, spec: NormSpec) -> dict[str, Tensor]:
    """Read the vectors of a combined message: {field name: (slots,) view}. Host syncs: none."""
    names = [field.name for field in FIELDS if field.included(spec)]
    return {name: buffer[i * num_slots : (i + 1) * num_slots] for i, name in enumerate(names)}


def unpack_facts(buffer: Tensor, *, on_host: bool) -> dict[str, Fact]:
    """Read the facts of a combined message: {fact name: whether it holds on some rank}.

    Args:
        buffer: the combined message.
        on_host: whether the host reads the facts now, all of them at once.

    Host syncs: one on an accelerator with `on_host`, otherwise none.
    """
    # A sum counts ranks, a maximum is 0 or 1. On a device, all facts are compared by one kernel.
    n = len(FACTS)
    values = [count > 0 for count in buffer.tolist()[-n:]] if on_host else list((buffer[-n:] > 0).unbind())
    return {fact.name: as_fact(value) for fact, value in zip(FACTS, values, strict=True)}
