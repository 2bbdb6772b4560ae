"""Format numbers, counts and names for people, with the same rules in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ...errors import printable
from .statistics import Numbers

__all__ = [
    "MISSING",
    "format_count",
    "format_list",
    "format_number",
    "format_percent",
    "format_range",
    "pluralize",
    "printable",
    "shorten",
]

MISSING = "-"
"""Text for a value that a run does not have."""


def format_number(number: float) -> str:
    """Format a number with three significant digits.

    >>> format_number(0.000123456), format_number(12345.0), format_number(2.0), format_number(float("nan"))
    ('0.000123', '12,345', '2', '-')
    """
    if math.isnan(number):
        return MISSING
    if 1000 <= abs(number) < 1e6:
        return f"{number:,.0f}"
    return f"{number:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def format_count(number: float) -> str:
    """Format a count with thousands separators.

    >>> format_count(1234567)
    '1,234,567'
    """
    return f"{number:,.0f}"


def format_percent(share: float) -> str:
    """Format a share as a percentage with two significant digits.

    Args:
        share: 0 to 1, or NaN.

    >>> [format_percent(share) for share in (0, 0.0004, 0.04812, 0.101, 1, float("nan"))]
    ['0 %', '< 0.1 %', '4.8 %', '10 %', '100 %', '-']
    """
    if math.isnan(share):
        return MISSING
    if 0 < share < 0.001:
        return "< 0.1 %"
    digits = 1 if share < 0.1 else 0
    return f"{100 * share:.{digits}f}".removesuffix(".0") + " %"


def format_range(values: Numbers) -> str:
    """Format the minimum and the maximum of numbers, or one number if they are nearly equal.

    Args:
        values: (n,), at least one of them not NaN.

    >>> format_range(np.array([1.0, 2.5, np.nan])), format_range(np.array([2.0, 2.0001]))
    ('1 … 2.5', '2')
    """
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{high:.3g}" if high - low <= 1e-3 * abs(high) else f"{low:.3g} … {high:.3g}"


def format_list(items: Iterable[object], limit: int = 5) -> str:
    """Join the first items with commas, and count the remaining ones.

    >>> format_list([17, 4, 250], 2)
    '17, 4 and 1 more'
    """
    texts = [printable(item) for item in items]
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def pluralize(count: int, noun: str) -> str:
    """Format a count and its noun.

    >>> pluralize(1, "step"), pluralize(1500, "spike")
    ('1 step', '1,500 spikes')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shorten(text: str, width: int) -> str:
    """Replace the middle of a text that is longer than `width` by an ellipsis.

    >>> shorten("transformer.layers.31.mlp.down_proj.weight", 23)
    'transformer…proj.weight'
    """
    if len(text) <= width:
        return text
    return f"{text[: (width - 1) // 2]}…{text[len(text) - width // 2 :]}"
