"""What a user of the command can put right."""

from __future__ import annotations

__all__ = ["BenchError"]


class BenchError(Exception):
    """Says what was asked for, what is wrong with it, and what to write instead."""
