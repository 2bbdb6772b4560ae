"""The charts of a page as PNGs for papers, in matplotlib."""

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

from ..analysis.log import Log
from .distribution import Histogram, histograms
from .palette import GREY, MARKS, QUANTILES, Style, styles
from .series import Line, Panel, panels
from .tensors import HeatMap, heat_maps
from .words import short, shortened

__all__ = ["write_pictures"]

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
    # The names in a log are not formulas.
    "text.parse_math": False,
}
WIDTH = 5.5
"""Inches: the text of a page."""

DPI = 220


def write_pictures(logs: Sequence[Log], directory: Path) -> list[Path]:
    """Write the page's charts as PNGs; needs neither a browser nor a display.

    Args:
        logs: of the runs to show beside each other, at least one.
        directory: for the files; is made if it is not there.

    Returns:
        their paths: curves.png, distribution.png where a norm is above 0, and so on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    runs = styles([log.name for log in logs])
    curves, _ = panels(logs)
    maps, _ = heat_maps(logs)
    spread = histograms(logs)
    found = {panel.key: panel for panel in curves}
    drawings: dict[str, Callable[[], Figure]] = {}
    both = [found[key] for key in ("norm", "loss") if key in found]
    drawings["norm_and_loss" if len(both) > 1 else "norm"] = lambda: _over_steps(both, runs)
    if clipping := [found[key] for key in ("coef", "clip_rate") if key in found]:
        drawings["clipping"] = lambda: _over_steps(clipping, runs)
    if others := [panel for panel in curves if panel.key not in ("norm", "loss", "coef", "clip_rate")]:
        drawings["columns"] = lambda: _over_steps(others, runs)
    if spread:
        drawings["distribution"] = lambda: _distribution(spread, runs)
    for i, each in enumerate(maps):
        drawings[f"tensors_{i + 1}" if len(maps) > 1 else "tensors"] = lambda each=each: _tensors(each, runs)  # type: ignore[misc]
    # Close to the largest number there is, matplotlib's margins are beyond it.
    with rc_context(RC), _any_script(), np.errstate(over="ignore"):
        return [_save(draw(), directory / f"{name}.png") for name, draw in drawings.items()]


@contextmanager
def _any_script() -> Iterator[None]:
    """A name may have letters that the font has not: boxes stand for them, and there is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _over_steps(each: Sequence[Panel], runs: Sequence[Style]) -> Figure:
    tall = [panel.tall for panel in each]
    figure = _figure(0.6 + sum(tall) / 135)
    rows = figure.subplots(len(each), sharex=True, squeeze=False, height_ratios=tall)[:, 0]
    legend: dict[str, Line2D] = {}
    for axes, panel in zip(rows, each, strict=True):
        for line in panel.lines:
            style = runs[line.run]
            look = _line(style, runs)
            if line.trend is not None:
                axes.plot(line.steps, line.values, **{**look, "alpha": 0.35 * look["alpha"]})
            drawn, *_ = axes.plot(*_middle(line), **look, marker="." * (len(line.steps) < 3))
            if len(runs) > 1:
                legend.setdefault(style.group, drawn)
        for line in panel.bounds:
            own = line.run >= 0 and len(runs) > 1
            colour = runs[line.run].colour if own else GREY
            (drawn,) = axes.plot(line.steps, line.values, "--", color=colour, linewidth=0.9)
            legend.setdefault("bound", Line2D([], [], color=GREY, linestyle="--", linewidth=0.9))
        for mark in panel.marks:
            colour = MARKS[mark.kind].colour if len(runs) == 1 else runs[mark.run].colour
            axes.plot(mark.steps, mark.heights, **_symbol(mark.kind, colour))
            key = colour if len(runs) == 1 else GREY
            legend.setdefault(MARKS[mark.kind].label, Line2D([], [], **_symbol(mark.kind, key)))
        _axis(axes, panel)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _legend(figure, legend)
    return figure


def _middle(line: Line) -> tuple[Any, Any]:
    return (line.steps, line.values) if line.trend is None else (line.trend.steps, line.trend.values)


def _axis(axes: Axes, panel: Panel) -> None:
    axes.set_ylabel(panel.title.replace("<br>", "\n") if "<br>" in panel.title else shortened(panel.title, 28))
    if panel.log:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, *axes.get_ylim())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6 if panel.tall > 150 else 4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if panel.key == "clip_rate":
        axes.set_ylim(bottom=0)
    if panel.key == "coef":
        axes.set_ylim(0, 1.06)
        axes.set_yticks([0, 0.5, 1])


def _log_ticks(axis: Any, low: float, high: float, most: float = 50) -> None:
    narrow = high < most * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=7 if not narrow else 12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _distribution(each: Sequence[Histogram], runs: Sequence[Style]) -> Figure:
    figure = _figure(2.7)
    axes = figure.subplots()
    legend: dict[str, Line2D] = {}
    alone = len(runs) == 1
    for histogram in each:
        style = runs[histogram.run]
        outline: dict[str, Any] = {"linewidth": 1.0, "linestyle": ":" if style.dashed else "-"}
        axes.stairs(histogram.shares, histogram.edges, color=style.colour, **outline)
        if len(runs) < 5:
            axes.stairs(histogram.shares, histogram.edges, color=style.colour, alpha=0.2 / len(runs) ** 0.5, fill=True)
        if not alone:
            legend.setdefault(style.group, Line2D([], [], color=style.colour, **outline))
        if np.isfinite(histogram.bound) and histogram.bound > 0:
            axes.axvline(histogram.bound, color=GREY if alone else style.colour, linestyle="--", linewidth=0.9)
            legend.setdefault("bound", Line2D([], [], color=GREY, linestyle="--", linewidth=0.9))
        for level, (_, shape) in QUANTILES.items():
            if len(runs) > 8 and level != 90:
                continue
            norm, share = histogram.quantiles[level]
            marker: dict[str, Any] = {"marker": shape, "markersize": 4.5, "linestyle": "", "markeredgecolor": "white"}
            axes.plot([norm], [share], color=style.colour, **marker)
            label = f"p{level}  {short(norm)}" if alone else f"p{level}"
            legend.setdefault(label, Line2D([], [], color=style.colour if alone else GREY, **marker))
    axes.set_xscale("log")
    _log_ticks(axes.xaxis, *axes.get_xlim(), most=1000)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("gradient norm, unclipped")
    axes.set_ylabel("steps, %")
    _legend(figure, legend)
    return figure


def _tensors(heat_map: HeatMap, runs: Sequence[Style]) -> Figure:
    rows = len(heat_map.names)
    figure = _figure(max(1.4, 0.7 + 0.13 * rows))
    axes = figure.subplots()
    low, high = heat_map.limits
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    steps = heat_map.steps.astype(np.float64)
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1.0))
    mesh = axes.pcolormesh(ends, np.arange(rows + 1), heat_map.logs, vmin=low, vmax=high, cmap="viridis")
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_yticks(np.arange(rows) + 0.5, [shortened(name, 40) for name in heat_map.labels], fontsize=6)
    axes.set_xlabel("step")
    if heat_map.pattern != "*":
        axes.set_ylabel(shortened(heat_map.pattern, 40), fontsize=6)
    if len(runs) > 1:
        axes.set_title(shortened(runs[heat_map.run].name, 60), fontsize=8, loc="left")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=high - low > 2))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: short(10.0**tick)))
    bar.set_label("norm")
    bar.outline.set_visible(False)
    return figure


def _line(style: Style, runs: Sequence[Style]) -> dict[str, Any]:
    few = len(runs) < 9
    linestyle = ":" if style.dashed else "-"
    return {"color": style.colour, "linewidth": 0.8 if few else 0.6, "alpha": 1 if few else 0.6, "linestyle": linestyle}


def _symbol(kind: str, colour: str) -> dict[str, Any]:
    shape = MARKS[kind]
    face = "none" if shape.open else colour
    edge = {"markeredgecolor": colour, "markeredgewidth": 0.8 if shape.open or shape.matplotlib == "x" else 0}
    return {
        "marker": shape.matplotlib,
        "markersize": shape.size / 2,
        "linestyle": "",
        "color": colour,
        "markerfacecolor": face,
        **edge,
    }


def _legend(figure: Figure, entries: dict[str, Line2D]) -> None:
    """Above the charts: it covers nothing."""
    if entries:
        # matplotlib leaves out a label that begins with an underscore.
        labels = [f"\N{WORD JOINER}{label}" if label.startswith("_") else shortened(label, 40) for label in entries]
        longest = max(map(len, labels))
        figure.legend(
            list(entries.values()), labels, loc="outside upper left", ncols=max(1, min(6, 90 // (longest + 6)))
        )
