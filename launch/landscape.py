"""A picture of the cliff: its loss over (w, b), and the paths that a run took on it, as a plotly figure."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import cliff

W, B = (2.0, 9.0), (-6.0, 1.0)
"""What is shown; paths that leave it are cut off at its edge."""
FINE = 141


def write(path: Path, paths: Tensor) -> None:
    """(paths, places, 2) of w and b."""
    try:
        import plotly.graph_objects as go
        from plotly.colors import qualitative
    except ImportError:
        Console().print(f"{path.name} is left out, which takes plotly: pip install plotly", highlight=False)
        return
    w, b = (torch.linspace(*ends, FINE, dtype=torch.float64) for ends in (W, B))
    out = cliff.output(torch.stack(torch.meshgrid(w, b, indexing="xy"), dim=-1))
    loss = (out - cliff.TARGET).square().clamp_min(1e-8).log10()
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
    for i, each in enumerate(paths):
        xs, ys = each.T.tolist()
        steps = [f"step {step}" for step in range(len(xs))]
        figure.add_scatter(
            x=xs,
            y=ys,
            text=steps,
            name=f"start {i + 1}",
            mode="lines+markers",
            marker={"size": 4, "color": qualitative.Set1[i % 9]},
        )
        # White: the end.
        figure.add_scatter(
            x=xs[-1:],
            y=ys[-1:],
            text=steps[-1:],
            showlegend=False,
            mode="markers",
            marker={"size": 10, "color": "white"},
        )
    figure.update_layout(
        title={"text": "The cliff: loss over w and b, and the paths of gradient descent (white: where they end)"},
        xaxis={"title": {"text": "w"}, "range": list(W)},
        yaxis={"title": {"text": "b"}, "range": list(B)},
        legend={"orientation": "h", "y": -0.15},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(figure.to_json())
