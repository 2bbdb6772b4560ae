"""Compare one call between its ranks within the all-reduce that the call makes anyway.

Every rank computes a checksum of what must be equal on all ranks: the function, its arguments, the number of the call,
the state of the policy. It multiplies the checksum by a weight, and the weights of all ranks add up to 0. So the sum
over ranks is exactly 0 if the checksums are equal, and the all-reduce grows by a single number.
"""

from __future__ import annotations

import functools
import itertools
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..devices import accumulation_dtype, copy_to_host_async, host_reads_free, odd_numbers
from ..errors import DisagreementError
from . import Comm, global_ranks
from .ranks import Ranks, rank_list

__all__ = ["Call", "CallCounter", "checksum_of", "disagreement", "unequal_calls", "zero_sum_weight"]

_MODULUS = 2**32
"""Checksums are less than this."""

_FEW = 64
"""Largest number of words that the host sums itself."""


class CallCounter:
    """Number of calls that this rank has entered over one communicator.

    `rounded_replicas` are the replica groups that these calls have found to differ by rounding errors only.
    """

    def __init__(self) -> None:
        self.count = 0
        self.rounded_replicas: frozenset[Ranks] = frozenset()
        # Function of the last call, whether it has failed, and a function that waits for this value. None if it has
        # been read.
        self._unread: tuple[str, Tensor, Callable[[], None]] | None = None

    def next(self) -> CallCounter:
        """Count a call when it is entered, so that an interrupted call counts as well."""
        self.count += 1
        return self

    def defer(self, function: str, failed: Tensor) -> None:
        """Defer to the next call the host read of whether this call has failed.

        Args:
            function: name of the function, as the user knows it.
            failed: 0-d bool, on an accelerator.

        Host syncs: none.
        """
        self._unread = (function, *copy_to_host_async(failed))

    def raise_due(self) -> None:
        """Raise if the last call has failed and the host has not read this yet.

        Raises:
            DisagreementError: see above; on every rank that has not raised an error in that call.

        Host syncs: one on an accelerator, for a call that has ended long ago.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        function, failed, wait = unread
        wait()
        if bool(failed):
            raise unequal_calls(function, f"call {self.count}")


# Not frozen, because a frozen dataclass takes longer to make, at every step.
@dataclass(slots=True, eq=False)
class Call:
    """Facts about one call that must be equal on all of its ranks.

    Args:
        function: name of the function, as the user knows it.
        counter: counts the calls; the current count is the number of this one.
        facts: (name, value) pairs: arguments, and state that the call starts from. The `repr` of a value must be equal
            in every process.
        state: (name, tensors) pairs: further state, which may be on a device and need not be read by the host.

    >>> Call("clip_grad_norm_", CallCounter(), (("max_norm", 1.0),)).checksum()
    3669041611
    """

    function: str
    counter: CallCounter
    facts: tuple[tuple[str, Any], ...] = ()
    state: tuple[tuple[str, Sequence[Tensor]], ...] = ()

    def checksum(self, *more: Any) -> int | Tensor:
        """Return a checksum of all facts and states, and of `more` values.

        Returns:
            0 ≤ checksum < 2^33, a number, or a 0-d int64 tensor on the device of the state. The value is the same on
            every device.

        Host syncs: none.
        """
        value = zlib.crc32(repr((self.function, self.counter.count, self.facts, more)).encode())
        tensors = [tensor for _, tensors in self.state for tensor in tensors]
        return value + checksum_of(tensors) if tensors else value

    def as_dict(self) -> dict[str, str]:
        """Return every fact as text, for error messages. Host syncs: one for each part of the state."""
        named = [("function", self.function), ("number of the call", self.counter.count), *self.facts]
        for name, tensors in self.state:
            numbers = [number for tensor in tensors for number in tensor.reshape(-1)[:2].tolist()]
            shown = ", ".join(f"{number:.9g}" for number in numbers[:4])
            named.append((name, f"{shown} (checksum {int(checksum_of(tensors)):08x})"))
        return {name: value if isinstance(value, str) else repr(value) for name, value in named}


def unequal_calls(function: str, which: str) -> DisagreementError:
    """Return the error for a call that differs between ranks, without a gather of the differences.

    >>> str(unequal_calls("clip_grad_norm_", "this call"))[:72]
    'clip_grad_norm_: in this call, other ranks passed other arguments (max_n'
    """
    return DisagreementError(
        f"{function}: in {which}, other ranks passed other arguments (max_norm, norm_type, error_if_nonfinite), called "
        "another function, or failed. Its norm is NaN, and no gradient was changed. Make the same calls with the same "
        "arguments on every rank."
    )


@functools.cache
def zero_sum_weight(rank: int, size: int) -> int:
    """Return the weight of a rank's checksum. The weights of all ranks add up to 0.

    If the ranks have two different checksums, the sum is never 0, however many ranks have each of them.

    >>> [zero_sum_weight(rank, 4) for rank in range(4)]
    [-3, 1, 1, 1]
    """
    return 1 - size if rank == 0 else 1


def checksum_of(tensors: Sequence[Tensor]) -> int | Tensor:
    """Return a checksum of numbers and their order.

    Args:
        tensors: of real dtypes, at least one. They are compared on the device of the first.

    Returns:
        0 ≤ checksum < 2^32, a number if the host reads the tensors without a sync, otherwise a 0-d int64 tensor of the
        same value.

    Host syncs: none.

    >>> checksum_of([torch.tensor([1.0], dtype=torch.float64)])
    3218079744
    """
    first = tensors[0]
    if len(tensors) == 1 and first.numel() == 1 and first.dtype == torch.float64 and host_reads_free(first.device):
        # Usually this is the coefficient of the last step. Python takes its words apart faster than operators do.
        low, high = struct.unpack("=2i", struct.pack("=d", first.item()))
        return int(low + 3 * high) % _MODULUS
    device, dtype = first.device, accumulation_dtype(first.device)
    if len(tensors) == 1 and first.dtype == dtype and first.dim() == 1 and first.is_contiguous():
        flat = [first]
    else:
        flat = [tensor.detach().reshape(-1).to(device, dtype) for tensor in tensors]
    words = (flat[0] if len(flat) == 1 else torch.cat(flat)).view(torch.int32)
    # The factors are odd, so that no bit of a word is lost modulo a power of two. int64 overflows to the same value
    # everywhere.
    if words.numel() <= _FEW and host_reads_free(words.device):
        # The host sums a few numbers faster than operators do.
        total: int = sum(map(mul, words.tolist(), itertools.count(1, 2)))
        return total % _MODULUS
    checksum = (words * odd_numbers(words.numel(), words.device)).sum().remainder(_MODULUS)
    return int(checksum) if host_reads_free(checksum.device) else checksum


def disagreement(calls: Sequence[dict[str, str]], comm: Comm) -> DisagreementError | None:
    """Describe how the calls of some ranks differ.

    Args:
        calls: `Call.as_dict` of every rank.
        comm: the ranks that were gathered from.

    Returns:
        The error that every rank must raise, or None if the calls are equal.

    >>> from distclip.comm import threads
    >>> print(disagreement([{"function": "f", "max_norm": "1.0"}, {"function": "f", "max_norm": "0.5"}], threads(2)[0]))
    max_norm: 1.0 on rank 0; 0.5 on rank 1. The ranks of one call to f must have the same. No gradient was changed. \
Make the same calls with the same arguments on every rank.
    """
    ranks, differences = global_ranks(comm), []
    for name in dict.fromkeys(name for call in calls for name in call):
        by_value: dict[str, list[int]] = {}
        for rank, call in zip(ranks, calls, strict=True):
            by_value.setdefault(call.get(name, "missing"), []).append(rank)
        if len(by_value) > 1:
            values = "; ".join(f"{value:.200} on {rank_list(holders)}" for value, holders in by_value.items())
            differences.append(f"{name}: {values}")
    if not differences:
        return None
    functions = " or ".join(dict.fromkeys(call["function"] for call in calls))
    return DisagreementError(
        f"{'. '.join(differences)}. The ranks of one call to {functions} must have the same. No gradient was changed. "
        "Make the same calls with the same arguments on every rank."
    )
