"""Define the error and the warning that users of the commands can act on."""

from __future__ import annotations

__all__ = ["RunError", "UnreadableLinesWarning"]


class RunError(Exception):
    """A run that cannot be analyzed. The message is one line: the run, the problem and what to do instead."""


class UnreadableLinesWarning(UserWarning):
    """Lines of a run that were ignored: a crash truncated them, or no recorder wrote them."""
