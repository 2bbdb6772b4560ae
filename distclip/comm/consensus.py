"""Fail on all ranks together: collect errors on one rank, and raise where every rank is at the same collective.

A rank that raised on its own would leave the others waiting in the next collective. So an error is kept in a
`FirstError`, the rank enters the collective all the same, and the error travels with what the ranks exchange there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from ..errors import from_wire, to_wire
from . import Comm, ranks_of
from .ranks import Axis
from .rendezvous import Post, check

__all__ = ["FirstError", "check_same_axes", "gather_or_raise", "raise_gathered", "wire_of"]

T = TypeVar("T")


class FirstError:
    """Collect the first exception of some steps, for all ranks to raise together.

    As a context manager it keeps the exception that its block raises, and the program goes on behind the block.
    Only an `Exception` is kept: a KeyboardInterrupt ends the program as usual.

    Args:
        error: an exception that this rank has already run into, or None.

    >>> errors = FirstError()
    >>> with errors:
    ...     int("three")
    >>> errors.error
    ValueError("invalid literal for int() with base 10: 'three'")
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def add(self, error: Exception | None) -> None:
        """Keep `error`, unless an earlier one was kept."""
        self.error = self.error or error

    def run(self, step: Callable[..., T], *args: Any) -> T | None:
        """Call `step(*args)`; return None if it raises."""
        with self:
            return step(*args)
        return None

    def __enter__(self) -> FirstError:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.add(error)
        return True


def gather_or_raise(comm: Comm, error: Exception | None, message: T) -> list[T]:
    """Gather `message` from every rank. If any rank has an error, raise on all of them.

    Args:
        comm: the ranks that take part.
        error: what this rank has run into, or None.
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
    if hasattr(comm, "ranks"):
        clash = check({rank: Post((), axes) for rank, axes in zip(ranks_of(comm), by_rank, strict=True)})
        if clash is not None:
            raise clash


def wire_of(error: Exception | None) -> tuple[str, str] | None:
    """Return what other ranks need to raise `error` too, or None without an error."""
    return None if error is None else to_wire(error)


def raise_gathered(error: Exception | None, by_rank: Sequence[Any], comm: Comm) -> NoReturn:
    """Raise this rank's own error, or the one of the lowest other rank that has one.

    Args:
        error: of this rank, or None.
        by_rank: `wire_of` every rank's error; anything but a tuple stands for no error.
        comm: the ranks that were gathered from.
    """
    if error is not None:
        raise error
    wires = zip(ranks_of(comm), by_rank, strict=True)
    raise next(from_wire(rank, *wire) for rank, wire in wires if isinstance(wire, tuple))
