"""Run stages that contain the all-reduce, in one go or split in two.

Such stages are a generator with one `yield`, once the all-reduce has begun. So the code of a step stays in one
function, and a caller may do other work at the `yield`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

__all__ = ["begin", "complete", "run"]

T = TypeVar("T")
SentT = TypeVar("SentT")


def run(stages: Generator[Any, None, T]) -> T:
    """Run stages from their beginning to their end, and return their result."""
    begin(stages)
    return complete(stages, None)


def begin(stages: Generator[T, Any, Any]) -> T:
    """Run stages to their `yield`, and return what they yield."""
    try:
        return next(stages)
    except RuntimeError as error:
        _raise_own(error)
        raise


def complete(stages: Generator[Any, SentT, T], sent: SentT) -> T:
    """Run stages from their `yield` to their end.

    Args:
        stages: stages that have reached their `yield`.
        sent: value of the `yield`.

    Returns:
        The result of the stages.
    """
    try:
        stages.send(sent)
    except StopIteration as end:
        result: T = end.value
        return result
    except RuntimeError as error:
        _raise_own(error)
        raise
    raise AssertionError("stages have one yield")


def _raise_own(error: RuntimeError) -> None:
    """Raise the StopIteration of a user's function, which a generator turns into a RuntimeError."""
    if isinstance(error.__cause__, StopIteration):
        raise error.__cause__ from None
