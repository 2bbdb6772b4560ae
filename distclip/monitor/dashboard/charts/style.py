"""Style all charts of the page in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...analysis.formatting import shorten
from ..palette import GREY, RUN_COLOURS, Style

__all__ = ["apply_style", "escape_text", "hover_name", "log_ticks"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
"""Fonts of the page."""

GRID = "rgba(138, 143, 152, 0.22)"
"""Colour of grid lines."""

MARGIN = {"l": 70, "r": 16, "t": 16, "b": 44}
"""Margins of a chart in pixels."""


def apply_style(figure: Any, height: int, num_entries: int, runs: Sequence[Style]) -> None:
    """Set the layout that all charts share. Its text is readable in the page's light and dark mode.

    Args:
        figure: plotly figure.
        height: height of the plot area, in pixels.
        num_entries: number of runs in the legend.
        runs: styles of all runs.
    """
    longest = max((len(style.group) for style in runs if style.first), default=0)
    rows = 1 if num_entries < 2 else 1 + num_entries * min(longest, 40) // 110
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
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": RUN_COLOURS[0]},
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


def log_ticks(columns: Sequence[NDArray[np.floating[Any]]], size: int) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis: one label per decade, or three if there is room.

    Args:
        columns: all values on the axis.
        size: size of the axis, in pixels.
    """
    values = np.concatenate(columns)
    positive = values[np.isfinite(values) & (values > 0)]
    decades = float(np.ptp(np.log10(positive))) if len(positive) else 0.0
    step = "D2" if decades < size / 130 else max(1, math.ceil(decades * 35 / size))
    plain = not len(positive) or (positive.min() > 1e-4 and positive.max() < 1e6)
    ticks = {"dtick": step, "exponentformat": "none" if plain else "power"}
    # Without a format, plotly shortens 0.5 and 50 to 5 if there are three labels per decade.
    return ticks | {"tickformat": "~g" if plain else "~e"} if step == "D2" else ticks


def hover_name(style: Style, runs: Sequence[Style]) -> str:
    """Return the run's name for a hover label, or nothing if there is only one run."""
    return escape_text(shorten(style.name, 40)) if len(runs) > 1 else ""


def escape_text(text: str) -> str:
    """Escape markup and %{template}, which plotly would interpret.

    >>> escape_text("<b>%{x}")
    '&lt;b&gt;%&#123;x}'
    """
    return escape(text).replace("{", "&#123;")
