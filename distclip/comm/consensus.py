"""Fail on all ranks together: collect errors on one rank, and raise where every rank is at the same collective.

A rank that raised alone would leave the other ranks waiting in the next collective. So a `FirstError` keeps the error,
the rank still enters the collective, and the error travels with the data of that collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from ..errors import DisagreementError, from_wire, to_wire
from . import Comm, global_ranks
from .ranks import Axis

__all__ = [
    "FirstError",
    "axes_contradiction",
    "check_same_axes",
    "describe_axes",
    "gather_or_raise",
    "raise_gathered",
    "wire_of",
]

T = TypeVar("T")


class FirstError:
    """Collect the first exception of some steps, so that all ranks can raise it together.

    As a context manager it keeps the exception that its block raises, and the program continues after the block.
    A KeyboardInterrupt is kept as well: it is raised once this rank has entered the collective that others wait in.

    Args:
        error: an exception that this rank has already run into, or None.

    >>> errors = FirstError()
    >>> with errors:
    ...     int("three")
    >>> errors.error
    ValueError("invalid literal for int() with base 10: 'three'")
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def add(self, error: BaseException | None) -> None:
        """Keep `error`, unless an earlier one was kept."""
        self.error = self.error or error

    def __enter__(self) -> FirstError:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is not None:
            self.add(error)
        return True


def gather_or_raise(comm: Comm, error: BaseException | None, message: T) -> list[T]:
    """Gather `message` from every rank. If any rank has an error, raise on all of them.

    Args:
        comm: the ranks that take part.
        error: error of this rank, or None.
        message: what the other ranks need from this one; anything that pickles.

    Returns:
        The messages, by rank.

    Raises:
        DistclipError: the error of the lowest rank that has one. A rank with an error raises its own.

    Collectives: one gather over `comm`.

    >>> from distclip import LocalComm
    >>> gather_or_raise(LocalComm(), None, "ready")
    ['ready']
    """
    gathered = comm.gather_objects((wire_of(error), message))
    if any(failed for failed, _ in gathered):
        raise_gathered(error, [failed for failed, _ in gathered], comm)
    return [value for _, value in gathered]


def check_same_axes(by_rank: Sequence[tuple[Axis, ...]], comm: Comm) -> None:
    """Raise if the ranks of a caller's communicator passed contradictory axes of `split_over=`.

    Args:
        by_rank: the axes of every rank of `comm`, the same on all of them.
        comm: the ranks that take part.

    Raises:
        DisagreementError: on every rank.

    Collectives: none.
    """
    # Axes name global ranks, which cannot be compared with the members of one process.
    if comm.ranks is not None:
        contradiction = axes_contradiction(dict(zip(comm.ranks, by_rank, strict=True)))
        if contradiction is not None:
            raise contradiction


def axes_contradiction(by_rank: Mapping[int, tuple[Axis, ...]]) -> DisagreementError | None:
    """Find a contradiction between the axes of `split_over=` that ranks passed.

    Args:
        by_rank: the axes of some ranks, by global rank.

    Returns:
        The error to raise, or None if the axes are consistent.

    >>> print(axes_contradiction({0: (Axis((0, 1), "pp"),), 1: ()}))
    split_over= differs between the ranks of one call: rank 0 passed [pp over ranks [0, 1]], rank 1 passed None. \
Pass the same axes of the same mesh, through the rank itself, on every rank.
    """

    def contradiction(one: int, two: int) -> DisagreementError:
        return DisagreementError(
            f"split_over= differs between the ranks of one call: {describe_axes(by_rank, [one, two])}. "
            "Pass the same axes of the same mesh, through the rank itself, on every rank."
        )

    first = min(by_rank)
    for rank, axes in sorted(by_rank.items()):
        if [axis.name for axis in axes] != [axis.name for axis in by_rank[first]]:
            return contradiction(first, rank)
        for i, axis in enumerate(axes):
            # Every rank along an axis must have passed that very axis, in this position.
            for other in axis.ranks:
                if other in by_rank and by_rank[other][i : i + 1] != (axis,):
                    return contradiction(rank, other)
    return None


def describe_axes(by_rank: Mapping[int, tuple[Axis, ...]], ranks: Sequence[int]) -> str:
    """Describe which `split_over=` each of `ranks` passed, for error messages."""
    texts = [(rank, ", ".join(map(str, by_rank[rank]))) for rank in ranks]
    return ", ".join(f"rank {rank} passed {f'[{text}]' if text else None}" for rank, text in texts)


def wire_of(error: BaseException | None) -> tuple[str, str] | None:
    """Return the data that other ranks need to raise `error` too, or None without an error."""
    return None if error is None else to_wire(error)


def raise_gathered(error: BaseException | None, by_rank: Sequence[Any], comm: Comm) -> NoReturn:
    """Raise this rank's own error, or the one of the lowest other rank that has one.

    Args:
        error: this rank's error, or None.
        by_rank: `wire_of` every rank's error; anything but a tuple stands for no error.
        comm: the ranks that were gathered from.
    """
    if error is not None:
        raise error
    wires = zip(global_ranks(comm), by_rank, strict=True)
    raise next(from_wire(rank, *wire) for rank, wire in wires if isinstance(wire, tuple))
