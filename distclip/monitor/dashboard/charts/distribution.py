"""The distribution of the norms, in plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..distribution import Histogram
from ..palette import GREY, QUANTILES, Style
from ..words import short, shortened
from .layout import beside, finish, literal, log_ticks

__all__ = ["distribution"]


def distribution(each: Sequence[Histogram], runs: Sequence[Style]) -> Any:
    """The histograms over each other, percentiles marked on their outlines and bounds as lines."""
    figure = go.Figure()
    top = max(float(histogram.shares.max()) for histogram in each)
    alone = len(runs) == 1
    shown: set[float] = set()
    for histogram in each:
        style = runs[histogram.run]
        group = literal(style.group)
        edges, shares = histogram.edges, np.append(histogram.shares, 0.0)
        figure.add_trace(
            go.Scatter(
                x=edges.astype(np.float64),
                y=shares.astype(np.float32),
                mode="lines",
                line={"color": style.colour, "width": 1.5, "shape": "hv", "dash": "dot" if style.dashed else "solid"},
                fill="tozeroy",
                fillcolor=_faint(style.colour, 0.25 if alone else 0.10 if len(runs) < 5 else 0.0),
                name=literal(shortened(style.group, 40)),
                legendgroup=group,
                showlegend=style.first and not alone,
                hovertemplate=f"norm from %{{x:.3~g}}: %{{y:.2~f}} % of steps<extra>{beside(style, runs)}</extra>",
                meta="histogram",
            )
        )
        if np.isfinite(histogram.bound) and histogram.bound > 0:
            lonely = alone or len({each.bound for each in each}) == 1
            if not (lonely and histogram.bound in shown):
                figure.add_trace(
                    go.Scatter(
                        x=[histogram.bound] * 2,
                        y=[0, top * 1.05],
                        mode="lines",
                        line={"color": GREY if lonely else style.colour, "width": 1.5, "dash": "dash"},
                        name="bound",
                        legendgroup="bound" if lonely else group,
                        showlegend=lonely,
                        hovertemplate="bound %{x:.4~g}<extra></extra>",
                        meta="bound",
                    )
                )
            shown.add(histogram.bound)
        for level, (symbol, _) in QUANTILES.items():
            if len(runs) > 8 and level != 90:
                continue
            norm, share = histogram.quantiles[level]
            figure.add_trace(
                go.Scatter(
                    x=[norm],
                    y=[share],
                    mode="markers+text" if alone else "markers",
                    text=[f"p{level}  {short(norm)}"] if alone else None,
                    textposition="top right",
                    name=f"p{level}",
                    legendgroup=f"p{level}" if alone else group,
                    showlegend=False,
                    marker={"symbol": symbol, "size": 9, "color": style.colour, "line": {"width": 1, "color": "white"}},
                    hovertemplate=f"p{level}: %{{x:.4~g}}<extra>{beside(style, runs)}</extra>",
                    meta=f"p{level}",
                )
            )
    if not alone:
        if any(trace.meta == "bound" and not trace.showlegend for trace in figure.data):
            look = {"color": GREY, "width": 1.5, "dash": "dash"}
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name="bound", line=look, hoverinfo="skip"))
        for level, (symbol, _) in QUANTILES.items():
            if len(runs) <= 8 or level == 90:
                marker = {"symbol": symbol, "size": 9, "color": GREY}
                figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=f"p{level}", marker=marker))
    finish(figure, 300, sum(style.first for style in runs), runs)
    figure.update_xaxes(
        title_text="gradient norm, unclipped", type="log", **log_ticks([histogram.edges for histogram in each], 600)
    )
    figure.update_yaxes(title_text="steps, %", rangemode="tozero", tickformat="~g")
    return figure


def _faint(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
