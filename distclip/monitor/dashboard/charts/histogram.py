"""Draw the distributions of the norms with plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ...analysis.formatting import format_number, shorten
from ..histogram import Histogram
from ..palette import GREY, QUANTILES, Style
from .style import apply_style, escape_text, hover_name, log_ticks

__all__ = ["draw_histograms"]


def draw_histograms(histograms: Sequence[Histogram], runs: Sequence[Style]) -> Any:
    """Draw the histograms of all runs in one chart, with percentiles and bounds marked."""
    figure = go.Figure()
    top = max(float(histogram.shares.max()) for histogram in histograms)
    single = len(runs) == 1
    # One bound that all runs share is drawn once, in grey.
    shared_bound = single or len({histogram.bound for histogram in histograms}) == 1
    drawn_bounds: set[float] = set()
    for histogram in histograms:
        style = runs[histogram.run]
        group = escape_text(style.group)
        edges, shares = histogram.edges, np.append(histogram.shares, 0.0)
        figure.add_trace(
            go.Scatter(
                x=edges.astype(np.float64),
                y=shares.astype(np.float32),
                mode="lines",
                line={"color": style.colour, "width": 1.5, "shape": "hv", "dash": "dot" if style.dashed else "solid"},
                fill="tozeroy",
                fillcolor=_transparent(style.colour, 0.25 if single else 0.10 if len(runs) < 5 else 0.0),
                name=escape_text(shorten(style.group, 40)),
                legendgroup=group,
                showlegend=style.first and not single,
                hovertemplate=f"norm from %{{x:.3~g}}: %{{y:.2~f}} % of steps<extra>{hover_name(style, runs)}</extra>",
                meta="histogram",
            )
        )
        if np.isfinite(histogram.bound) and histogram.bound > 0:
            if not (shared_bound and histogram.bound in drawn_bounds):
                figure.add_trace(
                    go.Scatter(
                        x=[histogram.bound] * 2,
                        y=[0, top * 1.05],
                        mode="lines",
                        line={"color": GREY if shared_bound else style.colour, "width": 1.5, "dash": "dash"},
                        name="bound",
                        legendgroup="bound" if shared_bound else group,
                        showlegend=shared_bound,
                        hovertemplate="bound %{x:.4~g}<extra></extra>",
                        meta="bound",
                    )
                )
            drawn_bounds.add(histogram.bound)
        for level, symbol in QUANTILES.items():
            if len(runs) > 8 and level != 90:
                continue
            norm, share = histogram.quantiles[level]
            figure.add_trace(
                go.Scatter(
                    x=[norm],
                    y=[share],
                    mode="markers+text" if single else "markers",
                    text=[f"p{level}  {format_number(norm)}"] if single else None,
                    textposition="top right",
                    name=f"p{level}",
                    legendgroup=f"p{level}" if single else group,
                    showlegend=False,
                    marker={"symbol": symbol, "size": 9, "color": style.colour, "line": {"width": 1, "color": "white"}},
                    hovertemplate=f"p{level}: %{{x:.4~g}}<extra>{hover_name(style, runs)}</extra>",
                    meta=f"p{level}",
                )
            )
    if not single:
        _add_legend_entries(figure, len(runs))
    apply_style(figure, 300, sum(style.first for style in runs), runs)
    figure.update_xaxes(
        title_text="norm before clipping",
        type="log",
        **log_ticks([histogram.edges for histogram in histograms], 600),
    )
    figure.update_yaxes(title_text="steps, %", rangemode="tozero", tickformat="~g")
    return figure


def _add_legend_entries(figure: Any, num_runs: int) -> None:
    """Explain bounds and percentiles in grey, because their colours are those of the runs."""
    if any(trace.meta == "bound" and not trace.showlegend for trace in figure.data):
        look = {"color": GREY, "width": 1.5, "dash": "dash"}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name="bound", line=look, hoverinfo="skip"))
    for level, symbol in QUANTILES.items():
        if num_runs <= 8 or level == 90:
            marker = {"symbol": symbol, "size": 9, "color": GREY}
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=f"p{level}", marker=marker))


def _transparent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
