"""Define the error of the benchmark that its user can fix."""

from __future__ import annotations

__all__ = ["BenchError"]


class BenchError(Exception):
    """Invalid option or failed case of the command. The message ends with a remedy."""
