"""Everything over the steps, in plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from ..palette import GREY, MARKS, Style
from ..series import Line, Marked, Panel
from ..words import shortened
from .layout import beside, finish, literal, log_ticks

__all__ = ["over_steps"]

GAP = 26
"""Pixels between panels."""


def over_steps(panels: Sequence[Panel], runs: Sequence[Style]) -> Any:
    """All panels above each other on one axis of steps, so that to zoom one is to zoom all."""
    figure = go.Figure()
    height = sum(panel.tall for panel in panels) + GAP * (len(panels) - 1)
    above = 0
    for i, panel in enumerate(panels):
        axis = f"y{i + 1}" if i else "y"
        for line in panel.bounds:
            figure.add_trace(_bound(line, runs, axis))
        for line in panel.lines:
            figure.add_trace(_curve(line, panel, runs, axis, i == 0 and line.trend is None))
            if line.trend is not None:
                figure.add_trace(_trend(line.trend, panel, runs, axis, i == 0))
        for mark in panel.marks:
            figure.add_trace(_marks(mark, runs, axis))
        top, bottom = 1 - above / height, 1 - (above + panel.tall) / height
        figure.update_layout({f"yaxis{i + 1 if i else ''}": _axis(panel, (max(bottom, 0.0), top))})
        above += panel.tall + GAP
    if len(runs) > 1:
        for kind in dict.fromkeys(mark.kind for panel in panels for mark in panel.marks):
            figure.add_trace(_key(kind))
        if any(line.run >= 0 for line in panels[0].bounds):
            look = {"color": GREY, "width": 1.5, "dash": "dash"}
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name="bound", line=look, hoverinfo="skip"))
    last = f"y{len(panels)}" if len(panels) > 1 else "y"
    finish(figure, height, sum(style.first for style in runs), runs)
    ends = [float(line.steps[i]) for line in panels[0].lines if len(line.steps) for i in (0, -1)] or [0.0]
    figure.update_xaxes(title_text="step", anchor=last, tickformat=",d", range=_padded(min(ends), max(ends)))
    figure.update_layout(hovermode="closest")
    return figure


def _padded(low: float, high: float) -> list[float]:
    """Room for the marks at both ends."""
    room = max(0.012 * (high - low), 0.5)
    return [low - room, high + room]


def _curve(line: Line, panel: Panel, runs: Sequence[Style], axis: str, legend: bool) -> Any:
    style = runs[line.run]
    few = len(line.steps) < 3
    return go.Scatter(
        x=line.steps,
        y=line.values,
        yaxis=axis,
        mode="lines+markers" if few else "lines",
        name=literal(shortened(style.group, 40)),
        legendgroup=literal(style.group),
        showlegend=legend and style.first and len(runs) > 1,
        line={"color": style.colour, "width": 1.3 if len(runs) < 9 else 1, "dash": "dot" if style.dashed else "solid"},
        opacity=(1 if len(runs) < 9 else 0.65) * (1 if line.trend is None else 0.4),
        hovertemplate=f"step %{{x:,d}}: %{{y:.4~g}}<extra>{beside(style, runs)}</extra>",
        meta=panel.key,
    )


def _trend(line: Line, panel: Panel, runs: Sequence[Style], axis: str, legend: bool) -> Any:
    style = runs[line.run]
    return go.Scatter(
        x=line.steps,
        y=line.values,
        yaxis=axis,
        mode="lines",
        name=literal(shortened(style.group, 40)),
        legendgroup=literal(style.group),
        showlegend=legend and style.first and len(runs) > 1,
        line={"color": style.colour, "width": 1.6},
        hovertemplate=f"around step %{{x:,d}}: median %{{y:.4~g}}<extra>{beside(style, runs)}</extra>",
        meta=f"{panel.key} trend",
    )


def _bound(line: Line, runs: Sequence[Style], axis: str) -> Any:
    own = line.run >= 0 and len(runs) > 1
    colour = runs[line.run].colour if own else GREY
    group = literal(runs[line.run].group) if own else "bound"
    return go.Scatter(
        x=line.steps,
        y=line.values,
        yaxis=axis,
        mode="lines",
        name="bound",
        legendgroup=group,
        showlegend=not own,
        line={"color": colour, "width": 1.5, "dash": "dash"},
        hovertemplate="bound at step %{x:,d}: %{y:.4~g}<extra></extra>",
        meta="bound",
    )


def _marks(mark: Marked, runs: Sequence[Style], axis: str) -> Any:
    alone, shape = len(runs) == 1, MARKS[mark.kind]
    style = runs[mark.run]
    colour = shape.colour if alone else style.colour
    return go.Scatter(
        x=mark.steps,
        y=mark.heights,
        yaxis=axis,
        mode="markers",
        name=shape.label,
        legendgroup=mark.kind if alone else literal(style.group),
        showlegend=alone,
        text=mark.texts,
        marker=_symbol(mark.kind, colour),
        hovertemplate=f"step %{{x:,d}}: %{{text}}<extra>{beside(style, runs)}</extra>",
        meta=mark.kind,
    )


def _key(kind: str) -> Any:
    """What a shape means, where its colour is the run's."""
    name = MARKS[kind].label
    return go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=_symbol(kind, GREY), hoverinfo="skip")


def _symbol(kind: str, colour: str) -> dict[str, Any]:
    shape = MARKS[kind]
    edge = {"width": 1.6, "color": colour} if "open" in shape.plotly or "thin" in shape.plotly else {"width": 0}
    return {"symbol": shape.plotly, "size": shape.size, "color": colour, "line": edge, "opacity": 0.9}


def _axis(panel: Panel, domain: tuple[float, float]) -> dict[str, Any]:
    title = panel.title if "<br>" in panel.title else literal(shortened(panel.title, panel.tall // 7))
    axis: dict[str, Any] = {"domain": domain, "title": {"text": title}, "type": "log" if panel.log else "linear"}
    if panel.log:
        axis |= log_ticks([line.values for line in (*panel.lines, *panel.bounds)], panel.tall)
    else:
        axis |= {"nticks": 7 if panel.tall > 150 else 4, "tickformat": "~g"}
    if panel.key == "clip_rate":
        axis |= {"rangemode": "tozero"}
    if panel.key == "coef":
        axis |= {"range": [0, 1.06]}
    return axis
