"""Numbers as one reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .log import Numbers

__all__ = ["listed", "percent", "span"]


def percent(rate: float) -> str:
    """A part of a whole.

    >>> [percent(rate) for rate in (0, 0.0004, 0.048, 0.101, 1)]
    ['0 %', '0.04 %', '4.8 %', '10 %', '100 %']
    """
    return f"{100 * rate:.2g} %" if rate < 0.1 else f"{100 * rate:.0f} %"


def span(values: Numbers) -> str:
    """From the least to the most of some numbers, NaN left out, or the one that they all are."""
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{high:.3g}" if high - low <= 1e-3 * abs(high) else f"{low:.3g} … {high:.3g}"


def listed(things: Sequence[object], most: int = 5) -> str:
    """The first few, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more
