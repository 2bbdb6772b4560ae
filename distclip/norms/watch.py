"""Combine scalars of the user, such as a loss or a number of tokens, in the all-reduce of a step.

The kind of a scalar determines its elements in the message. `mean` and `sum` have two: the sum of the values, and the
number of ranks that have one. `max` has one element for each rank, because the all-reduce adds, and one for the number
of ranks that have a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from ..comm.consensus import FirstError
from ..devices import ALWAYS, Fact, as_fact, host_reads_free, is_fake, is_tracing
from ..errors import ArgumentError
from ..sharding.dtensor import is_dtensor, local_of
from .per_tensor import PerTensorPowers

__all__ = ["MAX_WATCHED", "NO_WATCH", "NO_WATCHED_TOTALS", "Reduction", "Watch", "Watched", "WatchedTotals"]

Reduction: TypeAlias = Literal["mean", "sum", "max"]
"""Reduction of the values of all ranks to one."""

Watched: TypeAlias = Mapping[str, "Tensor | float | tuple[Tensor | float | None, Reduction] | None"]
"""Scalars of the user: {name: value} for a mean, or {name: (value, reduction)}. None where this rank has no value."""

MAX_WATCHED = 16
"""Largest number of scalars of a call."""

_RESERVED = ("norm", "coef", "clipped", "finite", "skipped")
"""Keys of `Report.as_dict`."""

_EXAMPLE = 'Use watch={"loss": loss, "tokens": (num_tokens, "sum"), "slowest": (seconds, "max")}.'


class Position(Protocol):
    """Position of a rank among those of a call. A `Comm` is one."""

    @property
    def rank(self) -> int:
        """Index of this rank, 0 ≤ rank < size."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class WatchedTotals:
    """Watched scalars of all ranks, the same on each.

    Args:
        values: {name: 0-d}. NaN for a mean or a maximum if no rank has a value.
        finite: whether the values of all ranks are finite.
        local: names and values of this rank, to find those that are not finite.
    """

    values: Mapping[str, Tensor]
    finite: Fact = ALWAYS
    local: tuple[PerTensorPowers, ...] = ()


NO_WATCHED_TOTALS = WatchedTotals({})
"""Totals of a call without watched scalars."""


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """Scalars of one rank in one call.

    Args:
        kinds: (name, reduction) of each, in the order of the names, equal on all ranks.
        values: of this rank. None where it has none.
        length: minimum number of elements in the message, on which all ranks have agreed.
    """

    kinds: tuple[tuple[str, Reduction], ...] = ()
    values: Sequence[Tensor | float | None] = ()
    length: int = 0

    @classmethod
    def of(cls, watch: Any, errors: FirstError) -> Watch:
        """Return the scalars that a user passed.

        Args:
            watch: {name: value}, or {name: (value, reduction)}. None for none.
            errors: of this rank. It gets an `ArgumentError` for an argument of another kind.

        >>> errors = FirstError()
        >>> Watch.of({"loss": torch.tensor(2.0), "tokens": (3, "sum"), "aux": None}, errors).kinds
        (('aux', 'mean'), ('loss', 'mean'), ('tokens', 'sum'))
        >>> Watch.of({"loss": torch.zeros(2)}, errors).kinds, errors.error is None
        ((), False)
        """
        if not watch:
            return NO_WATCH
        with errors:
            return cls.checked(watch)
        return NO_WATCH

    @classmethod
    def checked(cls, watch: Any) -> Watch:
        """Return the scalars that a user passed.

        Raises:
            ArgumentError: for an argument of another kind.
        """
        if not watch:
            return NO_WATCH
        # Sorted, because the order of a dictionary may differ between ranks.
        checked = _checked_names(watch)
        scalars = [(name, *_checked_scalar(name, checked[name])) for name in sorted(checked)]
        return cls(tuple((name, kind) for name, kind, _ in scalars), [value for _, _, value in scalars])

    def num_elements(self, size: int) -> int:
        """Return the number of elements in the message for a given number of ranks."""
        return max(self.length, sum(_KINDS[kind].length(size) for _, kind in self.kinds))

    def write(self, like: Tensor, comm: Position) -> Tensor | None:
        """Return this rank's part of the message, or None if it is empty.

        Args:
            like: tensor with the dtype and the device of the message.
            comm: the ranks that take part.

        Host syncs: none, unless a value is on an accelerator and `like` is not.
        """
        num_elements = self.num_elements(comm.size) if self.kinds else self.length
        if num_elements == 0:
            return None
        numbers: list[Tensor | float] = []
        for (_, kind), value in zip(self.kinds, self.values, strict=True):
            numbers += _KINDS[kind].write(value, comm)
        # If an earlier call had more scalars, all messages since then have its length.
        numbers += [0.0] * (num_elements - len(numbers))
        if host_reads_free(like.device):
            return torch.tensor([float(number) for number in numbers], dtype=like.dtype, device=like.device)
        return torch.stack([_on_device_of(like, number) for number in numbers])

    def read(self, numbers: Tensor | None, comm: Position) -> WatchedTotals:
        """Return the totals from the part of the combined message that `write` has written.

        Host syncs: none on an accelerator.
        """
        if not self.kinds or numbers is None:
            return NO_WATCHED_TOTALS
        values, finite, first = {}, [], 0
        for name, kind in self.kinds:
            length = _KINDS[kind].length(comm.size)
            values[name], is_finite = _KINDS[kind].read(numbers[first : first + length])
            finite.append(is_finite)
            first += length
        # The values of each rank are read only if the step is not finite, to name the scalar that is not.
        names = tuple(f"watch[{name!r}]" for name, _ in self.kinds)
        own = torch.stack([_on_device_of(numbers, 0.0 if value is None else value) for value in self.values])
        return WatchedTotals(values, as_fact(torch.stack(finite).all()), (PerTensorPowers(names, own),))


NO_WATCH = Watch()
"""No scalars, in a job whose ranks have never watched any."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Encoding of one kind of scalar in the message.

    Args:
        length: returns the number of elements for a number of ranks.
        write: returns the elements of this rank, from its value or None.
        read: returns the reduced value, and whether the values of all ranks are finite, from the sums over ranks.
    """

    length: Callable[[int], int]
    write: Callable[[Tensor | float | None, Position], list[Tensor | float]]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


def _write_sum(value: Tensor | float | None, comm: Position) -> list[Tensor | float]:
    return [0.0, 0.0] if value is None else [value, 1.0]


def _read_sum(numbers: Tensor) -> tuple[Tensor, Tensor]:
    return numbers[0], numbers[0].isfinite()


def _read_mean(numbers: Tensor) -> tuple[Tensor, Tensor]:
    return numbers[0] / numbers[1], numbers[0].isfinite()


def _write_max(value: Tensor | float | None, comm: Position) -> list[Tensor | float]:
    # Each rank has an element where all other ranks write 0, so the sum over ranks has all values side by side.
    row: list[Tensor | float] = [0.0] * comm.size
    row[comm.rank] = -math.inf if value is None else value
    return [*row, float(value is not None)]


def _read_max(numbers: Tensor) -> tuple[Tensor, Tensor]:
    row, count = numbers[:-1], numbers[-1]
    # A rank without a value has written -inf.
    return torch.where(count > 0, row.amax(), math.nan), row.isfinite().sum() == count


_KINDS: dict[Reduction, _Kind] = {
    "mean": _Kind(lambda size: 2, _write_sum, _read_mean),
    "sum": _Kind(lambda size: 2, _write_sum, _read_sum),
    "max": _Kind(lambda size: size + 1, _write_max, _read_max),
}


def _on_device_of(like: Tensor, number: Tensor | float) -> Tensor:
    """Return a number as a 0-d tensor of the dtype and on the device of `like`."""
    if isinstance(number, Tensor) and not host_reads_free(number.device):
        return number.to(like)
    # `full` passes a number to a kernel, and a number on the host would be copied to the device with a host sync.
    return torch.full((), float(number), dtype=like.dtype, device=like.device)


def _checked_names(watch: Any) -> Mapping[str, Any]:
    """Return the argument of a user.

    Raises:
        ArgumentError: it is not a mapping from names, or has too many names.
    """
    if not isinstance(watch, Mapping) or not all(isinstance(name, str) and name for name in watch):
        raise ArgumentError(f"watch={watch!r:.80}: not a dictionary of names and scalars. {_EXAMPLE}")
    if len(watch) > MAX_WATCHED:
        raise ArgumentError(
            f"watch: {len(watch)} scalars, and at most {MAX_WATCHED} travel in the all-reduce. Use fewer."
        )
    if taken := [name for name in watch if name in _RESERVED]:
        raise ArgumentError(f"watch: {taken[0]!r} is a value of the report already. Use another name.")
    return watch


def _checked_scalar(name: str, value: Any) -> tuple[Reduction, Tensor | float | None]:
    """Return the reduction and the value of a scalar.

    Raises:
        ArgumentError: it is not a scalar.
    """
    kind: Any = "mean"
    if isinstance(value, tuple) and len(value) == 2:
        value, kind = value
    if kind not in get_args(Reduction):
        raise ArgumentError(f"watch[{name!r}]={value!r:.60}, {kind!r:.40}: no such reduction. {_EXAMPLE}")
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.layout is not torch.strided:
            shape = tuple(value.shape)
            raise ArgumentError(
                f"watch[{name!r}]: a tensor of shape {shape} and dtype {value.dtype} is not a scalar. Pass its mean."
            )
        if is_dtensor(value):
            if not all(placement.is_replicate() for placement in value.placements):
                raise ArgumentError(
                    f"watch[{name!r}]: it is a DTensor that is not replicated. Pass value.full_tensor()."
                )
            value = local_of(value)
        # Under FakeTensorMode a rank has no number.
        return kind, None if is_fake(value) and not is_tracing() else value.detach().reshape(())
    if value is None:
        return kind, None
    if not isinstance(value, Real):
        raise ArgumentError(f"watch[{name!r}]={value!r:.60}: not a scalar. {_EXAMPLE}")
    return kind, float(value)
