"""Declare the buffer of the one all-reduce, field by field: what a rank writes, and what all ranks read.

A message has four parts:

1. `FIELDS`: vectors with an element per slot, which are added up, or combined by a maximum for p = ±inf.
2. `Partials.watch`: scalars of the user, whose names and number the ranks have agreed on before.
3. `COUNTS`: bools that may well differ between ranks. Their sum is the number of ranks where they hold.
4. `CHECKS`: summands that add up to exactly 0 in an ordinary step. Where they do not, the host gathers the reason.
   `FACTS` are part of such a checksum: bools that are equal on all ranks in an ordinary step.

To add a field, add its name to one of these tuples, and add attributes of this name to `Partials` for its writer and to
`Totals` for its reader. `NormSpec.measured` has the names of the vectors and counts of a call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from .. import devices
from ..comm import Comm, start_sum
from ..comm.agreement import zero_sum_weight
from ..devices import ALWAYS, Fact, as_fact
from .measure import Partials
from .replica_sums import weighted_sum
from .spec import NormSpec
from .watch import WatchedTotals

__all__ = [
    "CHECKS",
    "COUNTS",
    "FACTS",
    "FIELDS",
    "Check",
    "FactField",
    "Message",
    "check_bits",
    "facts_anywhere",
    "maximum",
    "own_counts",
    "own_facts",
    "own_vectors",
    "start_all_reduce",
]


@dataclass(frozen=True, slots=True)
class FactField:
    """One bool per rank that is equal on all ranks in an ordinary step.

    Args:
        name: attribute of `Partials` with this rank's value. On `Totals`, a `Fact`: whether it holds on any rank.
        agreed: attribute of `Partials` that has the value of all ranks if an earlier gather has found it, and None
            otherwise. A value that is known needs no comparison.
    """

    name: str
    agreed: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One summand per rank. The summands of all ranks add up to exactly 0 unless something is wrong.

    They must be integers, and every partial sum must stay below 2^51 in absolute value (2^22 for float32 messages, see
    `check_bits`). So each partial sum is exact, in any order, even where the host adds up all checks of a message.

    Args:
        name: of the check.
        write: this rank's summand, a number or a 0-d tensor.
    """

    name: str
    write: Callable[[Partials, Comm], Tensor | int]


def _call_summand(partials: Partials, comm: Comm) -> Tensor | int:
    """Return the weighted checksum of the call and of all facts."""
    facts: list[bool | None] = [*_own_facts(partials)]
    for i, agreed in _AGREED:
        facts[i] = None if agreed(partials) is not None else facts[i]
    checksum: Tensor | int = partials.call.checksum(*facts) % 2 ** check_bits(partials.powers.dtype, comm.size)
    return checksum * zero_sum_weight(comm.rank, comm.size)


def _replica_summand(partials: Partials, comm: Comm) -> Tensor | int:
    """Return the weighted checksums of all replicas on this rank."""
    # 32-bit checksums do not fit into a float32.
    sums = partials.replica_sums
    return weighted_sum(sums, comm) if sums and partials.powers.dtype == torch.float64 else 0


@functools.cache
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


FIELDS = ("powers", "weight_powers", "update_powers", "update_counts", "update_rates")
"""Vectors of the message, in order: attributes of `Partials` and of `Totals`, if `NormSpec.measured` has them."""

COUNTS = ("out_of_limits",)
"""Bools that can differ between ranks in an ordinary step, in order, with one number each. Attributes like `FIELDS`."""

FACTS = (
    FactField("failed"),
    FactField("uncovered"),
    FactField("widens_anew"),
    FactField("new_layouts"),
    FactField("has_partial_grads"),
    # Pipeline stages may have different dtypes. Without `agreed`, the ranks would gather in every step.
    FactField("has_fp64", agreed="fp64_anywhere"),
)
"""Bools that are equal on all ranks in an ordinary step. They add nothing to the length of the message."""

# attrgetter reads these attributes at the speed of C in every step.
own_vectors: Callable[[Partials], tuple[Tensor | None, ...]] = attrgetter(*FIELDS)
"""Returns the vectors of this rank in order, None for those that are not measured."""
_own_facts: Callable[[Partials], tuple[bool, ...]] = attrgetter(*(fact.name for fact in FACTS))
_READ_COUNTS = [(name, attrgetter(name)) for name in COUNTS]
_AGREED = [(i, attrgetter(fact.agreed)) for i, fact in enumerate(FACTS) if fact.agreed is not None]


def own_counts(partials: Partials, spec: NormSpec) -> dict[str, Tensor | bool]:
    """Return the counts of this rank by name."""
    return {name: read(partials) for name, read in _READ_COUNTS if name in spec.measured}


def own_facts(partials: Partials) -> dict[str, bool]:
    """Return the facts of this rank by name."""
    return dict(zip((fact.name for fact in FACTS), _own_facts(partials), strict=True))


def facts_anywhere(partials: Partials) -> dict[str, Fact]:
    """Return the facts that hold on any rank. They are valid if all ranks have equal checksums."""
    facts = [*_own_facts(partials)]
    for i, agreed in _AGREED:
        facts[i] = facts[i] if (known := agreed(partials)) is None else known
    return {fact.name: ALWAYS for fact, holds in zip(FACTS, facts, strict=True) if holds} if any(facts) else {}


CHECKS = (Check("call", _call_summand), Check("replicas", _replica_summand))
"""Summands that add up to 0, in order. One number each on an accelerator, and one for all of them on a CPU."""

_FEW = 64
"""Length of a vector that the host reads in less time than a slice of it takes."""

_CHECK_NAMES = [check.name for check in CHECKS]


@dataclass(slots=True)
class Message:
    """The combined message of all ranks.

    Args:
        watch: scalars of the user.
        fields: {name of a field: (slots,) view}. Empty for p = ±inf if a check failed, which the host has read.
        counts: {name of a count: whether it holds on some rank}.
        checks: {name of a check: whether its summands add up to 0}. On a CPU the summands of all checks are added up
            together, so that all checks have the same value.
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
        spec: the norm that was measured. Its p determines whether a sum or a maximum is taken.
        comm: the ranks that take part.
        on_host: whether the host reads counts and checks, all of them at once.
        overlap: return before the all-reduce is complete, if the backend can do so.
        is_same_norm: whether all ranks are known to measure the same norm.

    Returns:
        A function that waits and returns the combined message, the same bits on every rank.

    Collectives: one all-reduce over `comm`, and a second one for p = ±inf unless a check failed.
    Host syncs: one on an accelerator with `on_host`, or for p = ±inf unless `is_same_norm`. Otherwise none.
    """
    vectors, tail = _vectors(partials, spec), _tail(partials, spec, comm)
    watched = partials.watch.write(partials.powers, comm)
    # Every call begins with a sum, even if it needs a maximum, so that a different p on another rank is detected.
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
        num_head, first_of_tail = head.numel(), buffer.numel() - tail.numel()
        counts, checks = _read_tail(buffer, first_of_tail, spec, on_host=on_host)
        watched = buffer[num_head:first_of_tail] if first_of_tail > num_head else None
        message = Message(partials.watch.read(watched, comm), {}, counts, checks)
        # A rank that passed another p does not take the maximum, and its host reads nothing, so this host must read.
        must_read = takes_maximum and not (is_same_norm or buffer.is_meta or devices.is_capturing())
        if not takes_maximum:
            message.fields = _named(buffer[:num_head], spec)
        elif (checks["call"].read() if must_read else checks["call"].host) is not False:
            message.fields = maximum(partials, spec, comm)
        return message

    return finish


def _read_tail(buffer: Tensor, first: int, spec: NormSpec, *, on_host: bool) -> tuple[dict[str, Fact], dict[str, Fact]]:
    """Return the counts and checks of the combined message, which begin at element `first`, see `Message`."""
    if on_host:
        # Reading a few numbers too many takes less time than a slice.
        numbers = buffer.tolist()[first:] if first <= _FEW else buffer[first:].tolist()
        are_zero = [as_fact(number == 0) for number in numbers]
    else:
        # On a device, all numbers are compared by one kernel.
        are_zero = [as_fact(is_zero) for is_zero in (buffer[first:] == 0).unbind()]
    counts = {name: ~are_zero.pop(0) for name in COUNTS if name in spec.measured}
    passed = are_zero if len(are_zero) == len(CHECKS) else are_zero * len(CHECKS)
    return counts, dict(zip(_CHECK_NAMES, passed, strict=True))


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
    measured = spec.measured
    own = zip(FIELDS, own_vectors(partials), strict=True)
    vectors = [vector for name, vector in own if name in measured and vector is not None]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _named(vectors: Tensor, spec: NormSpec) -> dict[str, Tensor]:
    """Return the vectors by the names of their fields."""
    names = [name for name in FIELDS if name in spec.measured]
    if len(names) == 1:
        return {names[0]: vectors}
    return dict(zip(names, vectors.view(len(names), -1), strict=True))


def _tail(partials: Partials, spec: NormSpec, comm: Comm) -> Tensor:
    """Return the counts and checks of this rank, of the dtype and on the device of the power sums."""
    like = partials.powers
    values: list[Tensor | float] = [*own_counts(partials, spec).values()]
    checks = [check.write(partials, comm) for check in CHECKS]
    # The latency of gloo grows with the number of elements: 2 travel five times as fast as 6 over four ranks. The
    # device of the communicator decides, so that all ranks join their checks or none does.
    are_joined = comm.device is not None and devices.host_reads_free(comm.device)
    values += [sum(checks)] if are_joined else checks
    if devices.host_reads_free(like.device):
        if len(values) == 1:
            # This takes half of the time of `torch.tensor`.
            return like.new_full((1,), float(values[0]))
        return torch.tensor([float(value) for value in values], dtype=like.dtype)
    # `full` passes the number to a kernel. A list of numbers would be copied to the device, with a host sync.
    return torch.stack(
        [
            value.to(like) if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
            for value in values
        ]
    )
