"""Define the output of distclip's commands, a terminal or a pipe. It needs rich."""

from __future__ import annotations

from rich.console import Console

__all__ = ["WIDTH", "Screen"]

WIDTH = 120
"""Number of columns on a pipe, which has no width."""


class Screen:
    """Output of a command.

    Args:
        console: of rich. None for the standard output of the process. A console that is not a terminal is set to a
            width of 120.

    >>> Screen(Console(width=5)).line("[markup] is text")
    [markup] is text
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = WIDTH

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line that can be copied: it is never wrapped, and markup is plain text."""
        self.console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)
