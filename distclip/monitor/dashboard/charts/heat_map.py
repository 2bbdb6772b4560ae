"""Draw the per-tensor norms with plotly."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from ...analysis.formatting import format_number, shorten
from ..tensors import HeatMap
from .style import apply_style, escape_text

__all__ = ["draw_heat_map"]


def draw_heat_map(heat_map: HeatMap) -> Any:
    """Draw the norms of one run's tensors over the steps."""
    low, high = heat_map.limits
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    decades = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    ticks = list(decades) if len(decades) > 1 else np.linspace(low, high, 3).round(2).tolist()
    names = [escape_text(name) for name in heat_map.names]
    figure = go.Figure(
        go.Heatmap(
            x=heat_map.steps,
            y=names,
            z=heat_map.logs,
            zmin=low,
            zmax=high,
            colorscale="Viridis",
            colorbar={
                "title": {"text": "norm", "side": "right"},
                "tickvals": ticks,
                "ticktext": [format_number(10.0**tick) for tick in ticks],
                "thickness": 10,
                "outlinewidth": 0,
            },
            customdata=10.0**heat_map.logs,
            hoverongaps=False,
            hovertemplate="step %{x:,d}: %{customdata:.4~g}<br>%{y}<extra></extra>",
        )
    )
    labels = [escape_text(shorten(label, 34)) for label in heat_map.labels]
    pattern = escape_text(shorten(heat_map.pattern, max(16, 2 * len(names))))
    apply_style(figure, max(120, 17 * len(names)), 0, [])
    figure.update_xaxes(title_text="step", tickformat=",d", showgrid=False)
    figure.update_yaxes(
        title_text=pattern if heat_map.pattern != "*" else None,
        tickvals=names,
        ticktext=labels,
        autorange="reversed",
        showgrid=False,
        tickfont_size=11,
        automargin=True,
    )
    return figure
