"""What distclip raises, and on whom.

::

    DistclipError
    ├── ArgumentError      (ValueError)    an argument of the call cannot be meant
    ├── LayoutError        (ValueError)    the tensors do not say enough about where they lie, or contradict it
    ├── DisagreementError  (ValueError)    the ranks of one call do not ask for the same thing
    ├── PeerError          (RuntimeError)  another rank failed for a reason of its own
    └── NonFiniteError     (RuntimeError)  the total norm is NaN or infinite, and that was to be an error
        └── TooManySkippedSteps            so many steps in a row were skipped for it as were to be borne

    NonFiniteWarning       (UserWarning)   a step was skipped, or elements were set to zero
    FrequentClippingWarning         (UserWarning)   an adaptive policy clips more than half of the steps

All of them are raised on every rank that takes part in the call, and before any gradient is touched. On an accelerator
a host that waits for nothing learns that another rank failed when it next reads a number (a step later at most), and
raises a PeerError.
A message says what was seen and where, why it is wrong, and what to write instead.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "DisagreementError",
    "DistclipError",
    "FrequentClippingWarning",
    "LayoutError",
    "NonFiniteError",
    "NonFiniteWarning",
    "PeerError",
    "TooManySkippedSteps",
    "from_wire",
    "to_wire",
]


class DistclipError(Exception):
    """The root of everything that distclip raises."""


class ArgumentError(DistclipError, ValueError):
    """An argument cannot be meant: a negative bound, an unknown norm type, something that holds no tensors."""


class LayoutError(DistclipError, ValueError):
    """Nobody can say which ranks hold which piece of a gradient, or two statements about it clash."""


class DisagreementError(DistclipError, ValueError):
    """The ranks of one call passed different `split_over=`, or some of them never came."""


class PeerError(DistclipError, RuntimeError):
    """Another rank failed: with an exception that is not distclip's own, or on an accelerator, where nobody waits to be
    told more."""


class NonFiniteError(DistclipError, RuntimeError):
    """The total norm is NaN or infinite and `error_if_nonfinite=True` or `on_nonfinite="raise"` was given."""


class TooManySkippedSteps(NonFiniteError):
    """`max_skips` steps in a row had gradients that are not finite."""


class NonFiniteWarning(UserWarning):
    """A step was skipped because its gradients are not finite, or elements of them were set to zero."""


class FrequentClippingWarning(UserWarning):
    """An adaptive policy clips more than half of the steps: what it follows it also holds back."""


_SHARED = {kind.__name__: kind for kind in (ArgumentError, LayoutError, DisagreementError)}


def to_wire(error: Exception) -> tuple[str, str]:
    """What other ranks are told of a failure, (class name, message): what `from_wire` makes an exception of again.

    >>> to_wire(ArgumentError("max_norm=-1.0: negative"))
    ('ArgumentError', 'max_norm=-1.0: negative')
    """
    return type(error).__name__, str(error)


def from_wire(rank: int | None, kind: str, message: str) -> DistclipError:
    """The exception to raise here for what `rank` ran into.

    Args:
        rank: the rank that failed; None for what the ranks ran into together.
        kind: the class name of its exception.
        message: its text.

    Returns:
        An exception of the same class where the class is one of ours, a `PeerError` otherwise.

    >>> from_wire(3, "ArgumentError", "max_norm=-1.0: negative")
    ArgumentError('rank 3: max_norm=-1.0: negative')
    """
    if kind in _SHARED:
        return _SHARED[kind](message if rank is None else f"rank {rank}: {message}")
    return PeerError(f"rank {rank} failed with {kind}: {message}")
