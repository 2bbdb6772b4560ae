"""One HTML file of everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..._version import __version__
from ..analysis.log import Log
from . import charts as drawn
from .distribution import histograms
from .facts import facts
from .palette import Style, styles
from .series import panels
from .spikes import rows
from .tensors import heat_maps
from .verdicts import Verdict, remarks, verdicts
from .words import listed, plain, whole

__all__ = ["write_page"]

CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # A button that would send the chart to plotly's servers is there by default.
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
}


@dataclass(frozen=True)
class Chart:
    """A figure, drawn into `div`; below a heading of its own if it is of one `run` only."""

    div: Markup
    run: Style | None = None
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A heading of the page, what is missing below it, and what is not."""

    key: str
    title: str
    charts: Sequence[Chart]
    notes: Sequence[str] = ()


def write_page(logs: Sequence[Log], path: Path, judged: Sequence[Verdict] | None = None) -> None:
    """Write one HTML file that needs nothing else, no network either.

    Args:
        logs: of the runs to show beside each other, at least one.
        path: of the file; its directory must be there.
        judged: `verdicts` of the logs, where somebody has them; of a long run they take seconds.
    """
    runs, judged = styles([log.name for log in logs]), judged or verdicts(logs)
    spikes, spike_notes = rows(logs)
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, _, _ = environment.loader.get_source(environment, "page.css") if environment.loader else ("", None, None)
    html = environment.get_template("page.html").render(
        title="Gradient norms: " + (listed((run.name for run in runs), 3)),
        subtitle=_subtitle(logs),
        style=Markup(style),
        plotly=Markup(get_plotlyjs()),
        runs=runs,
        facts=facts(logs, judged),
        remarks=remarks(judged),
        quiet=[run for run, verdict in zip(runs, judged, strict=True) if not verdict.findings],
        judged=list(zip(runs, judged, strict=True)),
        sections=[section for section in _sections(logs, runs) if section.charts or section.notes],
        spikes=spikes,
        spike_notes=spike_notes,
        nonfinite=any(row.nonfinite for row in spikes),
        version=__version__,
    )
    path.write_text(html, encoding="utf-8", errors="replace")


def _subtitle(logs: Sequence[Log]) -> str:
    steps = [len(log.steps) for log in logs]
    counts = whole(steps[0]) if len(set(steps)) == 1 else f"{whole(min(steps))} to {whole(max(steps))}"
    return f"{counts} steps{' each' if len(logs) > 1 else ''}; norms are those before clipping, over all ranks"


def _sections(logs: Sequence[Log], runs: Sequence[Style]) -> list[Section]:
    curves, on_curves = panels(logs)
    spread = histograms(logs)
    maps, on_maps = heat_maps(logs)
    own, on_own = _own(logs, runs)
    charts = [Chart(_div(drawn.distribution(spread, runs), "distribution-chart"))] if spread else []
    tensors = [
        Chart(_div(drawn.tensor_norms(each), f"tensors-chart-{i}"), runs[each.run] if len(runs) > 1 else None)
        for i, each in enumerate(maps)
    ]
    kept = [f"The {len(each.names)} largest of {len(each.names) + each.left_out:,} tensors." for each in maps[:1]]
    return [
        Section("curves", "Over the steps", [Chart(_div(drawn.over_steps(curves, runs), "curves-chart"))], on_curves),
        Section("distribution", "Distribution of the norms", charts, [] if charts else ["No norm is above 0."]),
        Section("tensors", "Norms of the tensors", tensors, on_maps + (kept if maps and maps[0].left_out else [])),
        Section("own", "Figures of the runs", own, on_own),
    ]


def _own(logs: Sequence[Log], runs: Sequence[Style]) -> tuple[list[Chart], list[str]]:
    """The figures that the runs drew themselves, and a sentence on each that is none."""
    charts: list[Chart] = []
    notes = []
    for log, run in zip(logs, runs, strict=True):
        for path in log.figures:
            try:
                figure = _figure(path)
            except (OSError, ValueError) as error:  # noqa: PERF203
                notes.append(f"{plain(path)} is not a figure in plotly's JSON: {plain(str(error).splitlines()[0])}")
            else:
                charts.append(Chart(_div(figure, f"own-chart-{len(charts)}"), run, plain(path.stem)))
    return charts, notes


def _figure(path: Path) -> Any:
    """What of the file plotly knows how to draw.

    Raises:
        OSError, ValueError: nothing.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise ValueError('there is no "data" in it')
    return go.Figure({key: found[key] for key in ("data", "layout", "frames") if key in found}, skip_invalid=True)


def _div(figure: Any, name: str) -> Markup:
    """Its JSON has neither < nor >: nothing in it can end the script that it stands in."""
    return Markup(
        plotly.io.to_html(figure, config=CONFIG, include_plotlyjs=False, full_html=False, div_id=name, validate=False)
    )
