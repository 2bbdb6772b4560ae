"""Adapt pages to the site: options of code blocks that only the tests read, and links to files outside of docs/."""

from __future__ import annotations

import posixpath
import re
from typing import Any

REPOSITORY = "https://github.com/distclip/distclip/blob/main/"
FENCE = re.compile(r"^```(\w+) (?:ranks=\d+|file=(\S+))$", flags=re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the Markdown of a page before it is converted."""
    folder = posixpath.dirname(page.file.src_uri)

    def title(match: re.Match[str]) -> str:
        return f'```{match[1]} title="{match[2]}"' if match[2] else f"```{match[1]}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        return match[0] if target.startswith("docs/") else f"]({REPOSITORY}{target}{match[2] or ''})"

    return LINK.sub(link, FENCE.sub(title, markdown))
