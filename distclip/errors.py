"""Define the exceptions and warnings that distclip raises.

::

    DistclipError
    ├── ArgumentError             (ValueError)    an argument is invalid
    ├── LayoutError               (ValueError)    the sharding of a tensor is unknown or contradictory
    ├── DisagreementError         (ValueError)    the ranks of one call passed different arguments
    ├── PeerError                 (RuntimeError)  another rank failed, and its own traceback has the reason
    ├── ReplicaError              (RuntimeError)  replicas differ between ranks, and the caller asked for an error
    └── NonFiniteError            (RuntimeError)  the total norm is NaN or Inf, and the caller asked for an error
        └── TooManySkippedSteps                   `max_skips` consecutive steps were skipped

    NonFiniteWarning              (UserWarning)   a step was skipped, or elements were set to zero
    ReplicaWarning                (UserWarning)   replicas of a gradient or a parameter differ between ranks
    FrequentClippingWarning       (UserWarning)   an adaptive policy clips more than half of the steps
    ExplodedWarmupWarning         (UserWarning)   the norms exploded in the warm-up of an adaptive policy
    UnclippedStepWarning          (UserWarning)   parameters move by gradients that were not clipped

Every rank that takes part in a call raises, before any gradient is changed. On an accelerator the host does not
synchronize every step, so that the other ranks raise `PeerError` at their next host read, at most one step later.
A message names the argument or the parameter, states what is wrong, and ends with what to do.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "ArgumentError",
    "DisagreementError",
    "DistclipError",
    "ExplodedWarmupWarning",
    "FrequentClippingWarning",
    "LayoutError",
    "NonFiniteError",
    "NonFiniteWarning",
    "PeerError",
    "ReplicaError",
    "ReplicaWarning",
    "TooManySkippedSteps",
    "UnclippedStepWarning",
    "from_wire",
    "printable",
    "to_wire",
    "warn_user",
]


def printable(text: object) -> str:
    """Replace control characters and lone surrogates, which a terminal or a file would interpret.

    >>> printable("a\\x1b[31mb\\ud800")
    'a�[31mb�'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


class DistclipError(Exception):
    """Base class of all exceptions that distclip raises."""


class ArgumentError(DistclipError, ValueError):
    """Invalid argument: a negative bound, an unknown norm type, or an object that holds no tensors."""


class LayoutError(DistclipError, ValueError):
    """The sharding of a tensor is unknown or contradictory."""


class DisagreementError(DistclipError, ValueError):
    """The ranks of one call passed different arguments, such as `split_over=`, or some ranks never called."""


class PeerError(DistclipError, RuntimeError):
    """Another rank failed, and this rank does not know the reason or cannot raise the same exception.

    Either the other rank raised an exception that distclip does not define, or the tensors are on an accelerator, where
    this rank does not wait for a message.
    """


class ReplicaError(DistclipError, RuntimeError):
    """Replicas of a tensor differ between ranks, with `replicas="raise"`, or "repair" without a majority."""


class NonFiniteError(DistclipError, RuntimeError):
    """The total norm is NaN or Inf, and `error_if_nonfinite=True` or `on_nonfinite="raise"` was passed."""


class TooManySkippedSteps(NonFiniteError):
    """`max_skips` consecutive steps had non-finite gradients."""


class NonFiniteWarning(UserWarning):
    """A step was skipped because of non-finite gradients, or non-finite elements were set to zero."""


class ReplicaWarning(UserWarning):
    """Replicas of a gradient or a parameter differ between ranks."""


class FrequentClippingWarning(UserWarning):
    """An adaptive policy clips more than half of the steps, so that it limits the norms it learns from."""


class ExplodedWarmupWarning(UserWarning):
    """The norms rose severalfold in the warm-up of an adaptive policy, which no cap bounds."""


class UnclippedStepWarning(UserWarning):
    """Parameters move by gradients that the clipper has not clipped."""


@cache
def _libraries() -> tuple[str, ...]:
    """Return the folders whose lines a warning does not point to: those of distclip and torch."""
    torch = find_spec("torch")  # without importing it, because the command of distclip does not need it
    return tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch and torch.origin) if file)


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn, and point to the line of the user's program that called into distclip.

    Args:
        message: text of the warning.
        category: class of the warning.
    """
    # The number of frames in between varies: decorators of torch, hooks of optimizers, our own modules.
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_libraries()):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)


_SHARED = {kind.__name__: kind for kind in (ArgumentError, LayoutError, DisagreementError)}


def to_wire(error: BaseException) -> tuple[str, str]:
    """Convert an exception into (class name, message), which other ranks pass to `from_wire`.

    >>> to_wire(ArgumentError("max_norm=-1.0: negative"))
    ('ArgumentError', 'max_norm=-1.0: negative')
    """
    return type(error).__name__, str(error)


def from_wire(rank: int | None, kind: str, message: str) -> DistclipError:
    """Convert the failure of another rank into the exception that this rank must raise.

    Args:
        rank: the rank that failed. None if all ranks found the error together.
        kind: class name of that rank's exception.
        message: text of that rank's exception.

    Returns:
        An exception of the same class if the class is ArgumentError, LayoutError or DisagreementError. Otherwise a
        `PeerError`.

    >>> from_wire(3, "ArgumentError", "max_norm=-1.0: negative")
    ArgumentError('rank 3: max_norm=-1.0: negative')
    """
    if kind in _SHARED:
        return _SHARED[kind](message if rank is None else f"rank {rank}: {message}")
    return PeerError(f"rank {rank} failed with {kind}: {message}")
