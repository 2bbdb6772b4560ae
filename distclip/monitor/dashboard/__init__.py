"""Show runs: an HTML page (`write_page`), PNG charts for papers (`write_pngs`), a table in the terminal."""

from .findings import assess
from .html import Live, render_page, write_page
from .png import write_pngs
from .summary import print_summary

__all__ = ["Live", "assess", "print_summary", "render_page", "write_page", "write_pngs"]
