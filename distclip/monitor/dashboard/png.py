"""Write the charts of the page as PNG files for papers: matplotlib paints the figures that the page shows.

Data, colours, shapes, texts and axes come from the figure. This module maps the plotly properties that the charts use
to those of matplotlib.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..analysis.formatting import format_number, shorten
from ..analysis.log import Log
from .charts import draw_curves, draw_heat_map, draw_histograms
from .histogram import make_histograms
from .palette import assign_styles
from .panels import make_panels
from .tensors import make_heat_maps

__all__ = ["write_pngs"]

RC: Any = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    # Names in a log are not formulas.
    "text.parse_math": False,
}
"""Settings of matplotlib."""

WIDTH = 5.5
"""Width of a figure in inches, equal to that of a text column."""

DPI = 220
"""Resolution in pixels per inch."""

PIXELS = 120
"""Number of pixels of the page per inch of the figure."""

POINTS = 72 / PIXELS
"""Size of a pixel of the page in points."""

DASHES = {"solid": "-", "dash": "--", "dot": ":"}
"""Line styles of matplotlib by those of plotly."""

SHAPES = {"circle": "o", "diamond": "D", "square": "s", "triangle-down": "v", "x-thin": "x"}
"""Markers of matplotlib by the symbol of plotly."""


def write_pngs(logs: Sequence[Log], directory: Path) -> list[Path]:
    """Write the page's charts as PNG files. This needs neither a browser nor a display.

    Args:
        logs: logs of the runs to show side by side, at least one.
        directory: directory for the files. It is created if it does not exist.

    Returns:
        The paths: norm.png (norm_and_loss.png with losses), clipping.png, columns.png, distribution.png, tensors.png
        (tensors_1.png and so on for several runs). A chart without values is not written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    runs = assign_styles([log.name for log in logs])
    panels, _ = make_panels(logs)
    heat_maps, _ = make_heat_maps(logs)
    histograms = make_histograms(logs)
    groups = {
        "norm_and_loss": [panel for panel in panels if panel.key in ("norm", "loss")],
        "clipping": [panel for panel in panels if panel.key in ("coef", "clip_rate")],
        "columns": [panel for panel in panels if panel.key not in ("norm", "loss", "coef", "clip_rate")],
    }
    if len(groups["norm_and_loss"]) == 1:
        groups = {"norm": groups.pop("norm_and_loss"), **groups}
    figures = {name: (draw_curves(group, runs), "") for name, group in groups.items() if group}
    if histograms:
        figures["distribution"] = (draw_histograms(histograms, runs), "")
    several = len(heat_maps) > 1
    for i, heat_map in enumerate(heat_maps):
        title = runs[heat_map.run].name if len(runs) > 1 else ""
        figures[f"tensors_{i + 1}" if several else "tensors"] = (draw_heat_map(heat_map), title)
    # matplotlib adds margins, which overflow near the largest float.
    with rc_context(RC), _without_glyph_warnings(), np.errstate(over="ignore"):
        return [_save(paint(*figure), directory / f"{name}.png") for name, figure in figures.items()]


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Ignore warnings about characters that the font lacks: the chart shows a box for each of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def paint(figure: Any, title: str = "") -> Figure:
    """Paint a figure of `charts`.

    Args:
        figure: plotly figure.
        title: title above it.
    """
    layout = figure.layout
    keys = [trace.yaxis or "y" for trace in figure.data]
    # These are the panels from top to bottom.
    names = list(dict.fromkeys(keys))
    domains = [_axis_of(layout, name).domain or (0.0, 1.0) for name in names]
    painted = Figure(figsize=(WIDTH, layout.height / PIXELS), layout="constrained")
    FigureCanvasAgg(painted)
    ratios = [top - bottom for bottom, top in domains]
    rows = painted.subplots(len(names), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    axes = dict(zip(names, rows, strict=True))
    legend: dict[str, Artist] = {}
    for trace, key in zip(figure.data, keys, strict=True):
        if trace.type == "heatmap":
            _paint_heat_map(axes[key], trace)
        else:
            handle = _paint_scatter(axes[key], trace)
            if trace.showlegend is not False and trace.name:
                legend.setdefault(_plain(trace.name), handle)
    for name, row in axes.items():
        _format_axis(row, row.yaxis, _axis_of(layout, name))
    _format_axis(rows[-1], rows[-1].xaxis, layout.xaxis)
    if title:
        rows[0].set_title(shorten(title, 60), fontsize=8, loc="left")
    _add_legend(painted, legend)
    return painted


def _axis_of(layout: Any, name: str) -> Any:
    return layout[f"yaxis{name[1:]}"]


def _plain(text: str | None) -> str:
    """Return the plain characters of plotly's HTML text."""
    return unescape((text or "").replace("<br>", "\n"))


def _paint_scatter(axes: Axes, trace: Any) -> Line2D:
    """Paint lines, markers and the area below them, and return the handle for the legend."""
    look = _look(trace)
    # A trace that only serves the legend has one point, which is None.
    if trace.x is not None and len(trace.x) and trace.x[0] is not None:
        x, y = np.asarray(trace.x, np.float64), np.asarray(trace.y, np.float64)
        is_step = trace.line.shape == "hv"
        axes.plot(x, y, **look, drawstyle="steps-post" if is_step else "default")
        if trace.fill:
            colour = _rgba(trace.fillcolor)
            axes.fill_between(x, y, step="post" if is_step else None, color=colour, linewidth=0)
        if "text" in (trace.mode or ""):
            for position, height, text in zip(x, y, trace.text, strict=True):
                point = (float(position), float(height))
                axes.annotate(text, point, (4, 3), textcoords="offset points", fontsize=7)
    return Line2D([], [], **look)


def _look(trace: Any) -> dict[str, Any]:
    mode, marker = trace.mode or "", trace.marker
    look: dict[str, Any] = {"color": trace.line.color or marker.color, "alpha": trace.opacity or 1.0, "linestyle": ""}
    if "lines" in mode:
        look |= {"linestyle": DASHES[trace.line.dash or "solid"], "linewidth": POINTS * trace.line.width}
    if "markers" in mode:
        shape, is_open, _ = (marker.symbol or "circle").partition("-open")
        look |= {
            "marker": SHAPES[shape],
            "markersize": POINTS * (marker.size or 4),
            "markerfacecolor": "none" if is_open else marker.color or look["color"],
            "markeredgecolor": marker.line.color or look["color"],
            "markeredgewidth": POINTS * (marker.line.width or 0),
        }
    return look


def _rgba(colour: str) -> tuple[float, float, float, float]:
    red, green, blue, alpha = map(float, colour.removeprefix("rgba(").removesuffix(")").split(","))
    return red / 255, green / 255, blue / 255, alpha


def _paint_heat_map(axes: Axes, trace: Any) -> None:
    steps = np.asarray(trace.x, np.float64)
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1.0))
    colours = LinearSegmentedColormap.from_list("page", list(trace.colorscale))
    rows = np.arange(len(trace.y) + 1) - 0.5
    mesh = axes.pcolormesh(ends, rows, trace.z, vmin=trace.zmin, vmax=trace.zmax, cmap=colours)
    axes.grid(False)
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    bar.set_ticks(list(trace.colorbar.tickvals), labels=list(trace.colorbar.ticktext))
    bar.set_label(trace.colorbar.title.text)
    bar.outline.set_visible(False)


def _format_axis(axes: Axes, axis: Any, given: Any) -> None:
    """Give an axis the title, the scale, the range and the labels of the plotly axis."""
    is_x = axis is axes.xaxis
    axis.set_label_text(_plain(given.title.text))
    is_log = given.type == "log"
    if is_log:
        (axes.set_xscale if is_x else axes.set_yscale)("log")
    if given.tickvals is not None:
        labels = [_plain(text) for text in given.ticktext]
        axis.set_ticks(np.arange(len(labels)), labels, fontsize=6)
    elif is_log:
        subs = (1.0, 2.0, 5.0) if given.dtick == "D2" else (1.0,)
        base = 10.0 ** (given.dtick if given.dtick != "D2" else 1)
        axis.set_major_locator(LogLocator(base, subs=subs, numticks=100))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator((given.nticks or 7) - 1, integer=is_x and given.tickformat == ",d"))
    if given.tickvals is None:
        axis.set_major_formatter(FuncFormatter(_format_step if given.tickformat == ",d" else _format_tick))
    limits = given.range and [10.0**end if is_log else end for end in given.range]
    if limits:
        (axes.set_xlim if is_x else axes.set_ylim)(*limits)
    if given.rangemode == "tozero":
        axes.set_ylim(bottom=0)
    if given.autorange == "reversed":
        axes.invert_yaxis()


def _format_step(value: float, _: object) -> str:
    return f"{value:,.0f}"


def _format_tick(value: float, _: object) -> str:
    return format_number(value)


def _add_legend(figure: Figure, entries: dict[str, Artist]) -> None:
    """Add a legend above the charts, so that it covers nothing."""
    if entries:
        # matplotlib ignores a label that begins with an underscore.
        labels = [f"\N{WORD JOINER}{label}" if label.startswith("_") else shorten(label, 40) for label in entries]
        longest = max(map(len, labels))
        figure.legend(
            list(entries.values()), labels, loc="outside upper left", ncols=max(1, min(6, 90 // (longest + 6)))
        )
