"""Convert doctests, `::` blocks and formulas of docstrings to Markdown, so that the reference shows them as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

DOCTEST = re.compile(r"^>>> .*\n(?:.+\n)*", flags=re.MULTILINE)
BLOCK = re.compile(r"^(.*)::\n\n((?:    .*\n|\n)+)", flags=re.MULTILINE)


def to_markdown(text: str) -> str:
    """Return a docstring with fences around its code.

    >>> print(to_markdown("Add.\\n\\n>>> 1 + 1\\n2"))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    """
    text = re.sub(r"^\.\. math:: (.*)$", r"`\1`", text + "\n", flags=re.MULTILINE)
    text = text.replace(":math:`", "`")
    text = BLOCK.sub(fence_block, text)
    return DOCTEST.sub(lambda match: f"```pycon\n{match[0]}```\n", text)


def fence_block(match: re.Match[str]) -> str:
    """Return a literal block as a fence: Python, unless it is a drawing or a list."""
    code = "\n".join(line[4:] for line in match[2].rstrip().splitlines())
    try:
        compile(code, "docstring", "exec")
    except SyntaxError:
        language = "text"
    else:
        language = "python"
    text = f"{match[1]}:" if match[1] else ""
    return f"{text}\n\n```{language}\n{code}\n```\n\n"


class Docstrings(Extension):
    """Converts each docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Convert the docstring of a class, function or attribute."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_module(self, *, mod: Any, **_: Any) -> None:
        """Convert the docstring of a module."""
        self.on_object(obj=mod)
