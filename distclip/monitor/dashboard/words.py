"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "listed", "median", "percent", "plain", "short", "shortened", "whole"]

NOTHING = "-"
"""In the place of what a run does not have."""


def short(number: float) -> str:
    """Three digits.

    >>> short(0.000123456), short(12345.0), short(2.0), short(float("nan"))
    ('0.000123', '12,345', '2', '-')
    """
    if math.isnan(number):
        return NOTHING
    if 1000 <= abs(number) < 1e6:
        return f"{number:,.0f}"
    return f"{number:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def whole(number: float) -> str:
    """A count.

    >>> whole(1234567)
    '1,234,567'
    """
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """A share, 0 to 1.

    >>> percent(0.04812), percent(0.00001), percent(0), percent(1)
    ('4.8 %', '< 0.1 %', '0 %', '100 %')
    """
    if math.isnan(share):
        return NOTHING
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def plain(text: object) -> str:
    """What a log calls something, without what a terminal or a file would take for more than text.

    >>> plain("a\\x1b[31mb\\ud800")
    'a�[31mb�'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def shortened(text: str, width: int) -> str:
    """A name that is too long, without its middle.

    >>> shortened("transformer.layers.31.mlp.down_proj.weight", 23)
    'transformer…proj.weight'
    """
    if len(text) <= width:
        return text
    return f"{text[: (width - 1) // 2]}…{text[len(text) - width // 2 :]}"


def listed(items: Iterable[object], most: int) -> str:
    """The first of them, and how many there are besides.

    >>> listed([17, 4, 250], 2)
    '17, 4 and 1 more'
    """
    texts = [plain(item) for item in items]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def median(values: NDArray[np.float64]) -> float:
    """Of the finite ones; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan
