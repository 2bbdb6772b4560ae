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
synchronize in every step, so the other ranks raise `PeerError` at their next host read, at most one step later. A
message names the argument or the parameter, states what is wrong, and ends with what to do.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FunctionType

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
    "short_repr",
    "to_wire",
    "warn_user",
]


def printable(text: object) -> str:
    """Replace control characters and lone surrogates, which a terminal or a file would interpret.

    >>> printable("a\\x1b[31mb\\ud800")
    'a�[31mb�'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def short_repr(value: object, length: int = 80) -> str:
    """Return the beginning of a value's `repr` on one line, or its type if that fails.

    >>> short_repr({"first": 1}, length=9)
    "{'first':"
    """
    try:
        return " ".join(repr(value).split())[:length]
    except Exception:
        return f"<{type(value).__name__}>"


class DistclipError(Exception):
    """Base class of all exceptions that distclip raises."""


class ArgumentError(DistclipError, ValueError):
    """Invalid argument: a negative bound, an unknown norm type, or an object that holds no tensors."""


class LayoutError(DistclipError, ValueError):
    """The sharding of a tensor is unknown or contradictory."""


class DisagreementError(DistclipError, ValueError):
    """The ranks of one call passed different arguments, such as `split_over=`, or some ranks never called."""


class PeerError(DistclipError, RuntimeError):
    """Another rank failed, and this rank lacks the reason or cannot raise the same exception.

    Either the other rank raised an exception that distclip does not define, or the tensors are on an accelerator, where
    this rank does not wait for the other rank's message.
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
    """An adaptive policy clips more than half of the steps, which limits the norms that it learns from."""


class ExplodedWarmupWarning(UserWarning):
    """The norms rose severalfold in the warm-up of an adaptive policy, where no cap bounds them."""


class UnclippedStepWarning(UserWarning):
    """Parameters move by gradients that the clipper has not clipped."""


_FRAMEWORKS = (
    *("torch", "accelerate", "deepspeed", "keras", "lightning", "pytorch_lightning", "lightning_fabric"),
    *("megatron", "ray", "torchft", "torchtitan", "transformers"),
)
"""Packages whose lines a warning must not point to."""


def _is_user_code(file: str) -> bool:
    """Return whether a file belongs neither to distclip nor to a framework that calls it."""
    modules = (sys.modules[name] for name in _FRAMEWORKS if name in sys.modules)
    folders = [str(Path(__file__).parent), *(path for module in modules for path in vars(module).get("__path__", ()))]
    return not file.startswith(tuple(f"{folder}{os.sep}" for folder in folders))


def warn_user(message: str, category: type[Warning], *, is_printed: bool = True) -> None:
    """Warn, and point to the line of the user's program that called into distclip.

    Args:
        message: text of the warning.
        category: class of the warning.
        is_printed: False on the ranks whose stderr need not show a warning that all ranks emit. Filters and
            `warnings.catch_warnings` work as on the other ranks, so that a filter that turns the warning into an error
            does so on all ranks.
    """
    # The number of frames in between varies: decorators of torch, hooks of optimizers, our own modules.
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and not _is_user_code(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    if is_printed or not _prints_warnings():
        warnings.warn(message, category, stacklevel=level + 1)
        return
    show = warnings.showwarning
    warnings.showwarning = lambda *args, **kwargs: None
    try:
        warnings.warn(message, category, stacklevel=level + 1)
    finally:
        warnings.showwarning = show


def _prints_warnings() -> bool:
    """Return whether warnings go to stderr: no program records them, or passes them on to a logger."""
    # `catch_warnings(record=True)` replaces the first function, and `logging.captureWarnings` the second one.
    show_message, show = vars(warnings).get("_showwarnmsg_impl"), vars(warnings).get("_showwarning_orig")
    is_default = isinstance(show_message, FunctionType) and show_message.__name__ == "_showwarnmsg_impl"
    return is_default and warnings.showwarning is show


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
