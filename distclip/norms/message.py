"""Declare the buffer of the one all-reduce, field by field: what a rank writes, and what all ranks read.

A message has four parts:

1. `FIELDS`: vectors with an element per slot, which are added up, or combined by a maximum for p = ±inf.
2. `WATCH`: scalars of the user, whose names and number the ranks have agreed on before.
3. `COUNTS`: bools that may well differ between ranks. A sum counts the ranks.
4. `CHECKS`: summands that add up to exactly 0 in an ordinary step. Where they do not, the host gathers the reason.
   `FACTS` travel in such a checksum: bools that are equal on all ranks in an ordinary step.

To add one, add a line to the tuple here, an attribute to `Partials` for its writer, and an attribute of the same name
to `Totals` for its reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import devices
from ..comm import Comm, start_sum
from ..comm.agreement import zero_sum_weight
from ..devices import Fact, as_fact
from .measure import Partials
from .replica_sums import weighted_sum
from .spec import NormSpec
from .watch import WatchedTotals

__all__ = [
    "CHECKS",
    "COUNTS",
    "FACTS",
    "FIELDS",
    "WATCH",
    "Check",
    "Count",
    "FactField",
    "Field",
    "Message",
    "WatchField",
    "check_bits",
    "maximum",
    "start_all_reduce",
]


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
class WatchField:
    """Scalars of the user, of which all ranks learn the mean, the sum or the maximum.

    Args:
        name: attribute of `Totals` that they become.
        write: this rank's numbers. None for no scalars in a job that has never watched any.
        read: the totals, from the sums of the numbers over ranks.
    """

    name: str
    write: Callable[[Partials, Comm], Tensor | None]
    read: Callable[[Partials, Tensor | None, Comm], WatchedTotals]


@dataclass(frozen=True, slots=True)
class Count:
    """One bool per rank, of which all ranks learn whether it holds on any of them.

    Args:
        name: attribute of `Totals` that it becomes, a `Fact`.
        write: this rank's value, a bool or a 0-d bool tensor.
        included: see `Field`.
    """

    name: str
    write: Callable[[Partials], Tensor | bool]
    included: Callable[[NormSpec], bool] = lambda spec: True


@dataclass(frozen=True, slots=True)
class FactField:
    """One bool per rank that is equal on all ranks in an ordinary step.

    Args:
        name: attribute of `Totals` that it becomes, a `Fact`: whether it holds on any rank.
        write: this rank's value.
        agreed: the value of all ranks, if an earlier gather has brought it. It needs no comparison then.
    """

    name: str
    write: Callable[[Partials], bool]
    agreed: Callable[[Partials], bool | None] = lambda partials: None

    def anywhere(self, partials: Partials) -> bool:
        """Return whether the fact holds on any rank, if all ranks have one checksum."""
        agreed = self.agreed(partials)
        return self.write(partials) if agreed is None else agreed


@dataclass(frozen=True, slots=True)
class Check:
    """One summand per rank. The summands of all ranks add up to exactly 0 unless something is wrong.

    They must be integers, and every partial sum must stay below 2^51 in absolute value (2^22 for float32 messages, see
    `check_bits`). So each partial sum is exact, in any order, also where the host adds up all checks of a message.

    Args:
        name: of the check.
        write: this rank's summand, a number or a 0-d tensor.
    """

    name: str
    write: Callable[[Partials, Comm], Tensor | int]


def _call_summand(partials: Partials, comm: Comm) -> Tensor | int:
    """Return the weighted checksum of the call and of all facts."""
    facts = (fact.write(partials) if fact.agreed(partials) is None else None for fact in FACTS)
    checksum: Tensor | int = partials.call.checksum(*facts) % 2 ** check_bits(partials.powers.dtype, comm.size)
    return checksum * zero_sum_weight(comm.rank, comm.size)


def _replica_summand(partials: Partials, comm: Comm) -> Tensor | int:
    """Return the weighted checksums of all replicas on this rank."""
    # 32-bit checksums do not fit into a float32.
    return weighted_sum(partials.replica_sums, comm) if partials.powers.dtype == torch.float64 else 0


def check_bits(dtype: torch.dtype, size: int) -> int:
    """Return the number of bits that a checksum may have, so that weighted sums of it are exact.

    The weights are below the number of ranks in absolute value.

    Args:
        dtype: of the message.
        size: number of ranks.

    >>> check_bits(torch.float64, 8), check_bits(torch.float64, 2**20), check_bits(torch.float32, 8)
    (32, 29, 17)
    """
    # 53 or 24 bits of an exact integer. One is for the sum of positive summands, and two are for four checks.
    mantissa = 53 if dtype == torch.float64 else 24
    return min(32, mantissa - 3 - size.bit_length())


FIELDS = (
    Field("powers", lambda partials: partials.powers),
    Field("weight_powers", lambda partials: partials.weight_powers, lambda spec: spec.needs_weights),
    Field("update_powers", lambda partials: partials.update_powers, lambda spec: spec.moment_eps is not None),
    Field("update_counts", lambda partials: partials.update_counts, lambda spec: spec.moment_eps is not None),
    Field("update_rates", lambda partials: partials.update_rates, lambda spec: spec.moment_eps is not None),
)
"""Vectors of the message, in order."""

WATCH = WatchField(
    "watch",
    lambda partials, comm: partials.watch.write(partials.powers, comm),
    lambda partials, numbers, comm: partials.watch.read(numbers, comm),
)
"""Scalars of the user. They have the numbers that `norms.watch` declares for each kind of scalar."""

COUNTS = (Count("out_of_limits", lambda partials: partials.out_of_limits, lambda spec: spec.limits is not None),)
"""Bools that differ between ranks also in an ordinary step, in order. One number each."""

FACTS = (
    FactField("failed", lambda partials: partials.failed),
    FactField("uncovered", lambda partials: partials.uncovered),
    FactField("widens_anew", lambda partials: partials.widens_anew),
    FactField("new_layouts", lambda partials: partials.new_layouts),
    FactField("has_partial_grads", lambda partials: partials.has_partial_grads),
    # Pipeline stages may have different dtypes, so that the ranks would gather this in every step.
    FactField("has_fp64", lambda partials: partials.has_fp64, lambda partials: partials.fp64_anywhere),
)
"""Bools that are equal on all ranks in an ordinary step. They add nothing to the length of the message."""

CHECKS = (Check("call", _call_summand), Check("replicas", _replica_summand))
"""Summands that add up to 0, in order. One number each on an accelerator, and one for all of them on a CPU."""


@dataclass(frozen=True, slots=True)
class Message:
    """The combined message of all ranks.

    Args:
        watch: scalars of the user.
        fields: {name of a field: (slots,) view}. Empty for p = ±inf if a check failed, which the host has read.
        counts: {name of a count: whether it holds on some rank}.
        checks: {name of a check: whether its summands add up to 0}. On a CPU all checks have the same value: whether
            all of them do.
    """

    watch: WatchedTotals
    fields: dict[str, Tensor]
    counts: dict[str, Fact]
    checks: dict[str, Fact]


def start_all_reduce(
    partials: Partials, spec: NormSpec, comm: Comm, *, on_host: bool, overlap: bool, is_same_norm: bool = True
) -> Callable[[], Message]:
    """Begin to combine what all ranks have measured.

    Args:
        partials: of this rank.
        spec: the norm that was measured; its p decides between a sum and a maximum.
        comm: the ranks that take part.
        on_host: whether the host reads counts and checks, all of them at once.
        overlap: return before the all-reduce is complete, if the backend can do so.
        is_same_norm: whether all ranks are known to measure the same norm.

    Returns:
        A function that waits and returns the combined message, the same bits on every rank.

    Collectives: one all-reduce over `comm`, and a second one for p = ±inf unless a check failed.
    Host syncs: one on an accelerator with `on_host`, or for p = ±inf unless `is_same_norm`. Otherwise none.
    """
    vectors, watched, tail = _vectors(partials, spec), WATCH.write(partials, comm), _tail(partials, spec, comm)
    # Every call begins with a sum, also if it needs a maximum: ranks that passed different p must find out.
    takes_maximum = math.isinf(spec.norm_type)
    head = torch.zeros_like(vectors) if takes_maximum else vectors
    buffer = torch.cat([head, tail] if watched is None else [head, watched, tail])
    wait: Callable[[], None] | None = None
    if overlap:
        _, wait = start_sum(comm, buffer, in_thread=True)
    else:
        comm.sum_(buffer)

    def finish() -> Message:
        if wait is not None:
            wait()
        return _read(buffer, len(head), len(tail), partials, spec, comm, on_host=on_host, is_same_norm=is_same_norm)

    return finish


def _read(
    buffer: Tensor,
    num_head: int,
    num_tail: int,
    partials: Partials,
    spec: NormSpec,
    comm: Comm,
    *,
    on_host: bool,
    is_same_norm: bool,
) -> Message:
    """Return the message in a buffer that the ranks have added up, see `start_all_reduce`."""
    takes_maximum = math.isinf(spec.norm_type)
    first_of_tail = len(buffer) - num_tail
    tail = buffer[first_of_tail:]
    counts = [count.name for count in COUNTS if count.included(spec)]
    checks = [check.name for check in CHECKS]
    # On a device, all numbers are compared by one kernel.
    nonzero = [as_fact(x) for x in ([number != 0 for number in tail.tolist()] if on_host else (tail != 0).unbind())]
    failed = nonzero[len(counts) :]
    passed = [~fact for fact in (failed * len(checks) if len(failed) < len(checks) else failed)]
    watched = buffer[num_head:first_of_tail] if first_of_tail > num_head else None
    watch = WATCH.read(partials, watched, comm)
    message = Message(watch, {}, dict(zip(counts, nonzero, strict=False)), dict(zip(checks, passed, strict=True)))
    if not takes_maximum:
        return replace(message, fields=_named(buffer[:num_head], spec))
    # A rank that passed another p enters no maximum, and its host reads nothing, so that this one must.
    can_read = not is_same_norm and not (tail.is_meta or devices.is_capturing())
    if (message.checks["call"].read() if can_read else message.checks["call"].host) is False:
        return message
    return replace(message, fields=maximum(partials, spec, comm))


def maximum(partials: Partials, spec: NormSpec, comm: Comm) -> dict[str, Tensor]:
    """Return the maximum over ranks of every vector: {name of a field: (slots,)}.

    Args:
        partials, spec, comm: see `start_all_reduce`.

    Collectives: one all-reduce over `comm`. Host syncs: none.
    """
    # A maximum over ranks may drop a NaN, depending on the order of the ranks. So NaN is replaced by the neutral -inf,
    # and a second half of the buffer marks where it was.
    vectors = _vectors(partials, spec)
    nan = vectors.isnan()
    halves = torch.cat([vectors.masked_fill(nan, -math.inf), nan.to(vectors.dtype)])
    comm.max_(halves)
    n = len(vectors)
    return _named(halves[:n].masked_fill(halves[n:] > 0, math.nan), spec)


def _vectors(partials: Partials, spec: NormSpec) -> Tensor:
    """Return the vectors of this rank, one after another."""
    vectors = [vector for field in FIELDS if field.included(spec) and (vector := field.write(partials)) is not None]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _named(vectors: Tensor, spec: NormSpec) -> dict[str, Tensor]:
    """Return the vectors by the names of their fields."""
    names = [field.name for field in FIELDS if field.included(spec)]
    return dict(zip(names, vectors.view(len(names), -1), strict=True))


def _tail(partials: Partials, spec: NormSpec, comm: Comm) -> Tensor:
    """Return the counts and checks of this rank, of the dtype and on the device of the power sums."""
    like = partials.powers
    values: list[Tensor | float] = [count.write(partials) for count in COUNTS if count.included(spec)]
    checks = [check.write(partials, comm) for check in CHECKS]
    # The latency of gloo grows with the number of elements: 2 travel five times as fast as 6 over four ranks. The
    # device is that of the communicator, so that all ranks join their checks or none does.
    are_joined = comm.device is not None and devices.host_reads_free(comm.device)
    values += [sum(checks)] if are_joined else checks
    if devices.host_reads_free(like.device):
        return torch.tensor([float(value) for value in values], dtype=like.dtype)
    # `full` passes the number to a kernel. A list of numbers would be copied to the device, with a host sync.
    return torch.stack(
        [
            value.to(like) if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
            for value in values
        ]
    )
