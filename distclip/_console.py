"""`Screen`: a terminal, or a pipe, that a command of distclip writes to; it needs rich."""

from __future__ import annotations

from rich.console import Console

__all__ = ["WIDTH", "Screen"]

WIDTH = 120
"""Of a pipe, which has none of its own."""


class Screen:
    """Where everything is shown.

    Args:
        console: rich's; None for the process' own output. One that is not a terminal becomes 120 wide.

    >>> Screen(Console(width=5)).line("[folded] is not")
    [folded] is not
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = WIDTH

    def line(self, text: str = "", style: str = "") -> None:
        """A line that may be copied: never folded, nothing in it is markup."""
        self.console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)
