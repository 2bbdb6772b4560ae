"""Draw the curves over the steps with plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ...analysis.formatting import shorten
from ..palette import GREY, MARKS, Style
from ..panels import Curve, Markers, Panel
from ..x_axes import XAxis
from .style import apply_style, escape_text, hover_name, log_ticks

__all__ = ["draw_curves"]

MAX_UNIFIED = 4
"""Maximum number of runs for a hover label with the values of all panels. More runs would fill the screen."""

GAP = 26
"""Distance between panels in pixels."""


def draw_curves(panels: Sequence[Panel], runs: Sequence[Style], x_axes: Sequence[XAxis] = ()) -> Any:
    """Draw all panels above each other on one axis of steps, so that zooming affects all of them.

    Args:
        panels: panels from top to bottom.
        runs: styles of all runs.
        x_axes: alternatives to steps, which the reader of the page can select.

    Returns:
        The figure. Its `meta` has the run of each trace, how the page smooths it, and the axes.
    """
    figure = go.Figure()
    runs_of: list[int | None] = []
    smooth: list[str | None] = []

    def add(trace: Any, run: int | None, smoothing: str | None = None) -> None:
        figure.add_trace(trace)
        # A curve that all runs share ends where the first run ends.
        runs_of.append(None if run is None else max(run, 0))
        smooth.append(smoothing)

    height = sum(panel.height for panel in panels) + GAP * (len(panels) - 1)
    above = 0
    for i, panel in enumerate(panels):
        axis = f"y{i + 1}" if i else "y"
        for curve in panel.bounds:
            add(_bound_trace(curve, runs, axis), curve.run)
        for curve in panel.curves:
            trend = curve.trend
            legend = i == 0 and trend is None
            add(_curve_trace(curve, panel, runs, axis, legend), curve.run, "whole" if trend is None else None)
            if trend is not None:
                add(_trend_trace(trend, panel, runs, axis, i == 0), curve.run, "median")
        for markers in panel.markers:
            add(_markers_trace(markers, runs, axis), markers.run)
        top, bottom = 1 - above / height, 1 - (above + panel.height) / height
        figure.update_layout({f"yaxis{i + 1 if i else ''}": _axis(panel, (max(bottom, 0.0), top))})
        above += panel.height + GAP
    if len(runs) > 1:
        for kind in dict.fromkeys(markers.kind for panel in panels for markers in panel.markers):
            add(_legend_trace(kind), None)
        if any(curve.run >= 0 for curve in panels[0].bounds):
            look = {"color": GREY, "width": 1.5, "dash": "dash"}
            add(go.Scatter(x=[None], y=[None], mode="lines", name="bound", line=look, hoverinfo="skip"), None)
    last = f"y{len(panels)}" if len(panels) > 1 else "y"
    apply_style(figure, height, sum(style.first for style in runs), runs)
    ends = [float(curve.steps[i]) for curve in panels[0].curves if len(curve.steps) for i in (0, -1)] or [0.0]
    linear = _with_margin(min(ends), max(ends))
    figure.update_xaxes(title_text="step", anchor=last, tickformat=",d", range=linear)
    if len(runs) <= MAX_UNIFIED:
        figure.update_layout(hovermode="x unified", hoversubplots="axis")
    else:
        figure.update_layout(hovermode="closest")
    axes = [{"title": axis.title, "steps": axis.steps, "positions": axis.positions} for axis in x_axes]
    figure.update_layout(meta={"runs": runs_of, "smooth": smooth, "axes": axes})
    return figure


def _with_margin(low: float, high: float) -> list[float]:
    """Extend a range so that markers at its ends are visible."""
    margin = max(0.012 * (high - low), 0.5)
    return [low - margin, high + margin]


def _step(runs: Sequence[Style]) -> str:
    """Return the beginning of a label: the step, unless one label for all panels has it."""
    return "" if len(runs) <= MAX_UNIFIED else "step %{x:,d}: "


def _short(panel: Panel) -> str:
    """Return the title of a panel for a label, on one line."""
    return escape_text(shorten(panel.title.replace("<br>", " "), 30))


def _curve_trace(curve: Curve, panel: Panel, runs: Sequence[Style], axis: str, legend: bool) -> Any:
    style = runs[curve.run]
    return go.Scatter(
        x=curve.steps,
        y=curve.values,
        yaxis=axis,
        # A line through one or two points is hard to see.
        mode="lines+markers" if len(curve.steps) < 3 else "lines",
        name=escape_text(shorten(style.group, 40)),
        legendgroup=escape_text(style.group),
        showlegend=legend and style.first and len(runs) > 1,
        line={"color": style.colour, "width": 1.3 if len(runs) < 9 else 1, "dash": "dot" if style.dashed else "solid"},
        opacity=(1 if len(runs) < 9 else 0.65) * (1 if curve.trend is None else 0.4),
        hovertemplate=f"{_step(runs)}{_short(panel)} %{{y:.4~g}}<extra>{hover_name(style, runs)}</extra>",
        meta=panel.key,
    )


def _trend_trace(trend: Curve, panel: Panel, runs: Sequence[Style], axis: str, legend: bool) -> Any:
    style = runs[trend.run]
    return go.Scatter(
        x=trend.steps,
        y=trend.values,
        yaxis=axis,
        mode="lines",
        name=escape_text(shorten(style.group, 40)),
        legendgroup=escape_text(style.group),
        showlegend=legend and style.first and len(runs) > 1,
        line={"color": style.colour, "width": 1.6},
        hovertemplate=f"{_step(runs)}{_short(panel)}, median %{{y:.4~g}}<extra>{hover_name(style, runs)}</extra>",
        meta=f"{panel.key} trend",
    )


def _bound_trace(curve: Curve, runs: Sequence[Style], axis: str) -> Any:
    own = curve.run >= 0 and len(runs) > 1
    colour = runs[curve.run].colour if own else GREY
    group = escape_text(runs[curve.run].group) if own else "bound"
    return go.Scatter(
        x=curve.steps,
        y=curve.values,
        yaxis=axis,
        mode="lines",
        name="bound",
        legendgroup=group,
        showlegend=not own,
        line={"color": colour, "width": 1.5, "dash": "dash"},
        hovertemplate=f"{_step(runs)}bound %{{y:.4~g}}<extra></extra>",
        meta="bound",
    )


def _markers_trace(markers: Markers, runs: Sequence[Style], axis: str) -> Any:
    single, mark = len(runs) == 1, MARKS[markers.kind]
    style = runs[markers.run]
    colour = mark.colour if single else style.colour
    return go.Scatter(
        x=markers.steps,
        y=markers.heights,
        yaxis=axis,
        mode="markers",
        name=mark.label,
        legendgroup=markers.kind if single else escape_text(style.group),
        showlegend=single,
        text=markers.texts,
        marker=_symbol(markers.kind, colour),
        hovertemplate=f"{_step(runs)}%{{text}}<extra>{hover_name(style, runs)}</extra>",
        meta=markers.kind,
    )


def _legend_trace(kind: str) -> Any:
    """Explain a shape in grey, because its colour is that of the run."""
    name = MARKS[kind].label
    return go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=_symbol(kind, GREY), hoverinfo="skip")


def _symbol(kind: str, colour: str) -> dict[str, Any]:
    mark = MARKS[kind]
    edge = {"width": 1.6, "color": colour} if "open" in mark.symbol or "thin" in mark.symbol else {"width": 0}
    return {"symbol": mark.symbol, "size": mark.size, "color": colour, "line": edge, "opacity": 0.9}


def _axis(panel: Panel, domain: tuple[float, float]) -> dict[str, Any]:
    title = panel.title if "<br>" in panel.title else escape_text(shorten(panel.title, panel.height // 7))
    axis: dict[str, Any] = {"domain": domain, "title": {"text": title}, "type": "log" if panel.log else "linear"}
    if panel.log:
        axis |= log_ticks([curve.values for curve in (*panel.curves, *panel.bounds)], panel.height)
    else:
        axis |= {"nticks": 7 if panel.height > 150 else 4, "tickformat": "~g"}
        values = np.concatenate([curve.values for curve in (*panel.curves, *panel.bounds)])
        values = values[np.isfinite(values)]
        if len(values) and values.min() == values.max() != 0:
            # Plotly's range of a constant extends one unit below and above it, so 0.0003 would look like 0. Nothing is
            # above a rate of 100 %.
            axis["range"] = sorted([0.0, (1.06 if panel.key == "clip_rate" else 2) * float(values[0])])
    if panel.key == "clip_rate":
        axis |= {"rangemode": "tozero"}
    if panel.key == "coef":
        axis |= {"range": [0, panel.coef_limit]}
    return axis
