"""What a user of the commands can put right."""

from __future__ import annotations

__all__ = ["RunError", "TornWarning"]


class RunError(Exception):
    """One line: which run, what is wrong with it, and what to do instead."""


class TornWarning(UserWarning):
    """Lines of a run could not be read and were left out: a crash tore them, or they are not a recorder's."""
