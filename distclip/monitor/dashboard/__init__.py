"""Show runs: an HTML page (`write_page`), PNG charts for papers (`write_pngs`), a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..analysis.log import Log
from .findings import assess
from .html import Live, render_page, write_page
from .summary import print_summary

__all__ = ["Live", "assess", "print_summary", "render_page", "write_page", "write_pngs"]


def write_pngs(logs: Sequence[Log], directory: Path) -> list[Path]:
    """Write charts as PNG files, see `png.write_pngs`."""
    # Importing matplotlib takes as long as writing a page, so it is imported only here.
    from .png import write_pngs

    return write_pngs(logs, directory)
