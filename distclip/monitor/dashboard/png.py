"""Write the charts of the page as PNG files for papers, with matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..analysis.formatting import format_number, shorten
from ..analysis.log import Log
from .histogram import Histogram, make_histograms
from .palette import GREY, MARKS, QUANTILES, Style, assign_styles
from .panels import Panel, make_panels
from .tensors import HeatMap, make_heat_maps

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
"""Width of a figure in inches: that of a text column."""

DPI = 220
"""Resolution in pixels per inch."""


def write_pngs(logs: Sequence[Log], directory: Path) -> list[Path]:
    """Write the page's charts as PNG files. This needs neither a browser nor a display.

    Args:
        logs: of the runs to show side by side, at least one.
        directory: for the files. It is created if it does not exist.

    Returns:
        The paths: norm.png (norm_and_loss.png with losses), clipping.png, columns.png, distribution.png, tensors.png
        (tensors_1.png and so on for several runs). A chart without values is not written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    runs = assign_styles([log.name for log in logs])
    panels, _ = make_panels(logs)
    heat_maps, _ = make_heat_maps(logs)
    histograms = make_histograms(logs)
    by_key = {panel.key: panel for panel in panels}
    drawings: dict[str, Callable[[], Figure]] = {}
    main = [by_key[key] for key in ("norm", "loss") if key in by_key]
    drawings["norm_and_loss" if len(main) > 1 else "norm"] = lambda: _draw_curves(main, runs)
    if clipping := [by_key[key] for key in ("coef", "clip_rate") if key in by_key]:
        drawings["clipping"] = lambda: _draw_curves(clipping, runs)
    if others := [panel for panel in panels if panel.key not in ("norm", "loss", "coef", "clip_rate")]:
        drawings["columns"] = lambda: _draw_curves(others, runs)
    if histograms:
        drawings["distribution"] = lambda: _draw_histograms(histograms, runs)
    for i, heat_map in enumerate(heat_maps):
        name = f"tensors_{i + 1}" if len(heat_maps) > 1 else "tensors"
        drawings[name] = lambda heat_map=heat_map: _draw_heat_map(heat_map, runs)  # type: ignore[misc]
    # Near the largest float, the margins that matplotlib adds overflow.
    with rc_context(RC), _without_glyph_warnings(), np.errstate(over="ignore"):
        return [_save(draw(), directory / f"{name}.png") for name, draw in drawings.items()]


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Ignore warnings about characters that the font lacks: the chart shows a box for each of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _make_figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_curves(panels: Sequence[Panel], runs: Sequence[Style]) -> Figure:
    heights = [panel.height for panel in panels]
    figure = _make_figure(0.6 + sum(heights) / 135)
    rows = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    legend: dict[str, Line2D] = {}
    for axes, panel in zip(rows, panels, strict=True):
        for curve in panel.curves:
            style = runs[curve.run]
            look = _line_look(style, runs)
            main = curve
            if curve.trend is not None:
                axes.plot(curve.steps, curve.values, **{**look, "alpha": 0.35 * look["alpha"]})
                main = curve.trend
            line, *_ = axes.plot(main.steps, main.values, **look, marker="." * (len(curve.steps) < 3))
            if len(runs) > 1:
                legend.setdefault(style.group, line)
        for curve in panel.bounds:
            own = curve.run >= 0 and len(runs) > 1
            colour = runs[curve.run].colour if own else GREY
            axes.plot(curve.steps, curve.values, "--", color=colour, linewidth=0.9)
            legend.setdefault("bound", Line2D([], [], color=GREY, linestyle="--", linewidth=0.9))
        for markers in panel.markers:
            colour = MARKS[markers.kind].colour if len(runs) == 1 else runs[markers.run].colour
            axes.plot(markers.steps, markers.heights, **_marker_look(markers.kind, colour))
            key = colour if len(runs) == 1 else GREY
            legend.setdefault(MARKS[markers.kind].label, Line2D([], [], **_marker_look(markers.kind, key)))
        _format_axis(axes, panel)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _add_legend(figure, legend)
    return figure


def _format_axis(axes: Axes, panel: Panel) -> None:
    axes.set_ylabel(panel.title.replace("<br>", "\n") if "<br>" in panel.title else shorten(panel.title, 28))
    if panel.log:
        axes.set_yscale("log")
        _set_log_ticks(axes.yaxis, *axes.get_ylim())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6 if panel.height > 150 else 4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    if panel.key == "clip_rate":
        axes.set_ylim(bottom=0)
    if panel.key == "coef":
        axes.set_ylim(0, panel.coef_limit)
        if panel.coef_limit < 1.1:
            axes.set_yticks([0, 0.5, 1])


def _set_log_ticks(axis: Any, low: float, high: float, max_ratio: float = 50) -> None:
    """Label three numbers per decade, or powers of ten only if the axis spans a ratio above `max_ratio`."""
    narrow = high < max_ratio * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=7 if not narrow else 12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _draw_histograms(histograms: Sequence[Histogram], runs: Sequence[Style]) -> Figure:
    figure = _make_figure(2.7)
    axes = figure.subplots()
    legend: dict[str, Line2D] = {}
    single = len(runs) == 1
    for histogram in histograms:
        style = runs[histogram.run]
        outline: dict[str, Any] = {"linewidth": 1.0, "linestyle": ":" if style.dashed else "-"}
        axes.stairs(histogram.shares, histogram.edges, color=style.colour, **outline)
        if len(runs) < 5:
            axes.stairs(histogram.shares, histogram.edges, color=style.colour, alpha=0.2 / len(runs) ** 0.5, fill=True)
        if not single:
            legend.setdefault(style.group, Line2D([], [], color=style.colour, **outline))
        if np.isfinite(histogram.bound) and histogram.bound > 0:
            axes.axvline(histogram.bound, color=GREY if single else style.colour, linestyle="--", linewidth=0.9)
            legend.setdefault("bound", Line2D([], [], color=GREY, linestyle="--", linewidth=0.9))
        for level, (_, shape) in QUANTILES.items():
            if len(runs) > 8 and level != 90:
                continue
            norm, share = histogram.quantiles[level]
            marker: dict[str, Any] = {"marker": shape, "markersize": 4.5, "linestyle": "", "markeredgecolor": "white"}
            axes.plot([norm], [share], color=style.colour, **marker)
            label = f"p{level}  {format_number(norm)}" if single else f"p{level}"
            legend.setdefault(label, Line2D([], [], color=style.colour if single else GREY, **marker))
    axes.set_xscale("log")
    _set_log_ticks(axes.xaxis, *axes.get_xlim(), max_ratio=1000)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("norm before clipping")
    axes.set_ylabel("steps, %")
    _add_legend(figure, legend)
    return figure


def _draw_heat_map(heat_map: HeatMap, runs: Sequence[Style]) -> Figure:
    num_rows = len(heat_map.names)
    figure = _make_figure(max(1.4, 0.7 + 0.13 * num_rows))
    axes = figure.subplots()
    low, high = heat_map.limits
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    steps = heat_map.steps.astype(np.float64)
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1.0))
    mesh = axes.pcolormesh(ends, np.arange(num_rows + 1), heat_map.logs, vmin=low, vmax=high, cmap="viridis")
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_yticks(np.arange(num_rows) + 0.5, [shorten(name, 40) for name in heat_map.labels], fontsize=6)
    axes.set_xlabel("step")
    if heat_map.pattern != "*":
        axes.set_ylabel(shorten(heat_map.pattern, 40), fontsize=6)
    if len(runs) > 1:
        axes.set_title(shorten(runs[heat_map.run].name, 60), fontsize=8, loc="left")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=high - low > 2))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: format_number(10.0**tick)))
    bar.set_label("norm")
    bar.outline.set_visible(False)
    return figure


def _line_look(style: Style, runs: Sequence[Style]) -> dict[str, Any]:
    few = len(runs) < 9
    linestyle = ":" if style.dashed else "-"
    return {"color": style.colour, "linewidth": 0.8 if few else 0.6, "alpha": 1 if few else 0.6, "linestyle": linestyle}


def _marker_look(kind: str, colour: str) -> dict[str, Any]:
    mark = MARKS[kind]
    return {
        "marker": mark.matplotlib,
        "markersize": mark.size / 2,
        "linestyle": "",
        "color": colour,
        "markerfacecolor": "none" if mark.open else colour,
        "markeredgecolor": colour,
        "markeredgewidth": 0.8 if mark.open or mark.matplotlib == "x" else 0,
    }


def _add_legend(figure: Figure, entries: dict[str, Line2D]) -> None:
    """Add a legend above the charts, where it covers nothing."""
    if entries:
        # matplotlib ignores a label that begins with an underscore.
        labels = [f"\N{WORD JOINER}{label}" if label.startswith("_") else shorten(label, 40) for label in entries]
        longest = max(map(len, labels))
        figure.legend(
            list(entries.values()), labels, loc="outside upper left", ncols=max(1, min(6, 90 // (longest + 6)))
        )
