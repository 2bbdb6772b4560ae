"""Define the output of distclip's commands, a terminal or a pipe. It needs rich."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from .errors import printable

__all__ = ["WIDTH", "Screen", "cell"]

WIDTH = 120
"""Number of columns on a pipe, which has no width."""


def cell(text: object, style: str = "") -> Text:
    """Return text for a table or a line, in which neither markup nor an escape sequence has an effect.

    >>> cell("[red]:smile:\\x1b[2J").plain
    '[red]:smile:�[2J'
    """
    return Text(printable(text), style)


class Screen:
    """Output of a command.

    Args:
        console: of rich. None for the standard output of the process. A console that is not a terminal is set to a
            width of 120.

    >>> Screen(Console(width=5)).line("[markup] is text :smile:")
    [markup] is text :smile:
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = WIDTH

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line that is never wrapped, in which markup and escape sequences are plain text."""
        self.console.print(cell(text, style), soft_wrap=True, highlight=False)
