"""What the charts of a page have alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..palette import GREY, RUNS, Style
from ..words import shortened

__all__ = ["beside", "finish", "literal", "log_ticks"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "rgba(138, 143, 152, 0.22)"

MARGIN = {"l": 70, "r": 16, "t": 16, "b": 44}


def finish(figure: Any, height: int, entries: int, runs: Sequence[Style]) -> None:
    """What all charts have alike; colours of text are the page's, which knows light from dark."""
    longest = max((len(style.group) for style in runs if style.first), default=0)
    rows = 1 if entries < 2 else 1 + entries * min(longest, 40) // 110
    margin = {**MARGIN, "t": MARGIN["t"] + 22 * rows}
    axis = {
        "gridcolor": GRID,
        "separatethousands": True,
        "zeroline": False,
        "linecolor": GRID,
        "ticks": "",
        "automargin": True,
    }
    figure.update_layout(
        template={"layout": {"xaxis": axis, "yaxis": axis}},
        height=height + margin["t"] + margin["b"],
        margin=margin,
        font={"family": FONT, "size": 12, "color": "#5f6570"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": RUNS[0]},
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 12},
            "itemsizing": "trace",
        },
        hoverlabel={"font": {"family": FONT, "size": 12}},
    )


def log_ticks(each: Sequence[NDArray[np.floating[Any]]], size: int) -> dict[str, Any]:
    """A label per decade, or two more in each if an axis of this many pixels has room for them."""
    values = np.concatenate(each)
    positive = values[np.isfinite(values) & (values > 0)]
    decades = float(np.ptp(np.log10(positive))) if len(positive) else 0.0
    step = "D2" if decades < size / 130 else max(1, math.ceil(decades * 35 / size))
    plain = not len(positive) or (positive.min() > 1e-4 and positive.max() < 1e6)
    return {"dtick": step, "exponentformat": "none" if plain else "power"}


def beside(style: Style, runs: Sequence[Style]) -> str:
    """The run's name beside what is seen under the mouse."""
    return literal(shortened(style.name, 40)) if len(runs) > 1 else ""


def literal(text: str) -> str:
    """A name that plotly shows as it is: no markup, and no %{template}.

    >>> literal("<b>%{x}")
    '&lt;b&gt;%&#123;x}'
    """
    return escape(text).replace("{", "&#123;")
