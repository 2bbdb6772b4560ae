"""Draw the loss of the cliff over (w, b) with the paths of a run, as a plotly figure."""

from itertools import cycle
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..models.cliff import TARGET, output

# Ranges of the picture. Paths that leave it are cut off at its edge.
W, B = (2.0, 9.0), (-6.0, 1.0)
GRID_SIZE = 141


def write(path: Path, paths: Tensor) -> None:
    """Write the figure as JSON, or print a hint if plotly is missing.

    Args:
        paths: w and b of each path at each step, of shape (paths, steps, 2).
    """
    try:
        import plotly.graph_objects as go
        from plotly.colors import qualitative
    except ImportError:
        Console().print(f"{path.name} is not written because plotly is missing: pip install plotly", highlight=False)
        return
    w, b = (torch.linspace(*ends, GRID_SIZE, dtype=torch.float64) for ends in (W, B))
    out = output(torch.stack(torch.meshgrid(w, b, indexing="xy"), dim=-1))
    loss = (out - TARGET).square().clamp_min(1e-8).log10()
    figure = go.Figure(
        go.Contour(
            x=w.tolist(),
            y=b.tolist(),
            z=[[round(value, 3) for value in row] for row in loss.tolist()],
            colorscale="Blues_r",
            contours={"coloring": "heatmap", "showlines": False},
            colorbar={"title": {"text": "log10 loss"}},
            hovertemplate="w %{x:.3g}, b %{y:.3g}: 10^%{z:.2f}<extra></extra>",
        )
    )
    for i, (points, color) in enumerate(zip(paths, cycle(qualitative.Dark24), strict=False), 1):
        xs, ys = points.T.tolist()
        steps = [f"step {step}" for step in range(len(xs))]
        line = {"mode": "lines+markers", "line": {"width": 1.5, "color": color}, "marker": {"size": 4, "color": color}}
        figure.add_scatter(x=xs, y=ys, text=steps, name=f"start {i}", **line)
        # A white marker ends each path.
        end = {"size": 10, "color": "white", "line": {"width": 2, "color": color}}
        figure.add_scatter(x=xs[-1:], y=ys[-1:], text=steps[-1:], showlegend=False, mode="markers", marker=end)
    figure.update_layout(
        title={"text": "The cliff: loss over w and b, with paths of gradient descent (white: end of a path)"},
        xaxis={"title": {"text": "w"}, "range": list(W)},
        yaxis={"title": {"text": "b"}, "range": list(B)},
        legend={"orientation": "h", "y": -0.15},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(figure.to_json(), encoding="utf-8")
