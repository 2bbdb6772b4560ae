"""Write the HTML page."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..._version import __version__
from ..analysis.formatting import format_count, format_list, printable
from ..analysis.log import Log
from .charts import draw_curves, draw_heat_map, draw_histograms
from .findings import Assessment, assess, group_findings
from .histogram import make_histograms
from .palette import Style, assign_styles
from .panels import make_panels
from .spikes import make_spike_rows
from .summary import make_summary
from .tensors import make_heat_maps
from .x_axes import make_x_axes

__all__ = ["Live", "render_page", "write_page"]


@dataclass(frozen=True)
class Live:
    """Addresses of a page that follows running jobs, relative to its own.

    Args:
        plotly: address of plotly.js.
        script: address of the script that looks for changes.
    """

    plotly: str
    script: str


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Args:
        name: id of its element.
        figure: plotly figure.
        run: style of the run, for a figure with its own heading; None for a figure of all runs.
        title: title of the figure.
    """

    name: str
    figure: Any
    run: Style | None = None
    title: str = ""

    @property
    def height(self) -> float:
        """Height in pixels, so that nothing moves when the figure is drawn."""
        return float(self.figure.layout.height or 450)


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        key: id of its element.
        title: heading.
        charts: figures.
        notes: sentences above the figures.
    """

    key: str
    title: str
    charts: Sequence[Chart]
    notes: Sequence[str] = ()


def write_page(logs: Sequence[Log], path: Path, assessments: Sequence[Assessment] | None = None) -> None:
    """Write one HTML file that needs no other file and no network.

    Args:
        logs: logs of the runs to show side by side, at least one.
        path: path of the file, in an existing directory.
        assessments: assessments of the logs, if the caller has them; computing them takes seconds for a long run.
    """
    path.write_text(render_page(logs, assessments)[0], encoding="utf-8", errors="replace")


def render_page(
    logs: Sequence[Log], assessments: Sequence[Assessment] | None = None, live: Live | None = None
) -> tuple[str, dict[str, str]]:
    """Return the page, and its figures as JSON by the id of their element.

    Args:
        logs, assessments: see `write_page`.
        live: addresses for a page that follows running jobs. None for a page that needs no other file.
    """
    runs, assessments = assign_styles([log.name for log in logs]), assessments or assess(logs)
    sections = [section for section in _make_sections(logs, runs) if section.charts or section.notes]
    charts = [chart for section in sections for chart in section.charts]
    # The JSON contains no <, so it cannot end the script that contains it.
    figures = {chart.name: chart.figure.to_json() for chart in charts}
    spikes, spike_notes = make_spike_rows(logs)
    summary = make_summary(logs, assessments)
    equal_rows = [row for row in summary if len(runs) > 1 and len(set(row.cells)) == 1 and row.label != "outcome"]
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = environment.get_template("page.html").render(
        title="Gradient norms: " + format_list((run.name for run in runs), 3),
        subtitle=_subtitle(logs),
        style=Markup(style),
        script=Markup(script),
        plotly=None if live is not None else Markup(_pack_plotly()),
        live=live,
        figures=Markup("{" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in figures.items()) + "}"),
        runs=runs,
        summary=[row for row in summary if row not in equal_rows],
        equal_rows=equal_rows,
        findings=group_findings(assessments),
        without_findings=[run for run, assessment in zip(runs, assessments, strict=True) if not assessment.findings],
        assessments=list(zip(runs, assessments, strict=True)),
        sections=sections,
        spikes=spikes,
        spike_notes=spike_notes,
        has_culprits=any(row.culprits for row in spikes),
        version=__version__,
    )
    return html, figures


@cache
def _pack_plotly() -> str:
    """Return plotly.js compressed to a third, in characters that need no escape in HTML."""
    return b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0, compresslevel=4)).decode()


def _subtitle(logs: Sequence[Log]) -> str:
    steps = [len(log.steps) for log in logs]
    if len(set(steps)) == 1:
        count = f"{format_count(steps[0])} steps{' each' if len(logs) > 1 else ''}"
    else:
        count = f"{format_count(min(steps))} to {format_count(max(steps))} steps each"
    return f"{count}. Norms are before clipping, over all ranks."


def _make_sections(logs: Sequence[Log], runs: Sequence[Style]) -> list[Section]:
    panels, panel_notes = make_panels(logs)
    histograms = make_histograms(logs)
    heat_maps, tensor_notes = make_heat_maps(logs)
    own_charts, own_notes = _make_own_charts(logs, runs)
    curves = [Chart("curves-chart", draw_curves(panels, runs, make_x_axes(logs)))]
    distribution = [Chart("distribution-chart", draw_histograms(histograms, runs))] if histograms else []
    tensors = [
        Chart(f"tensors-chart-{i}", draw_heat_map(heat_map), runs[heat_map.run] if len(runs) > 1 else None)
        for i, heat_map in enumerate(heat_maps)
    ]
    if heat_maps and heat_maps[0].num_hidden:
        num_shown = len(heat_maps[0].names)
        total = num_shown + heat_maps[0].num_hidden
        tensor_notes.append(f"The {num_shown} of {total:,} tensors with the largest norms are shown.")
    return [
        Section("curves", "Training curves", curves, panel_notes),
        Section(
            "distribution", "Distribution of the norms", distribution, [] if histograms else ["No norm is above 0."]
        ),
        Section("tensors", "Norms per tensor", tensors, tensor_notes),
        Section("own", "Figures of the runs", own_charts, own_notes),
    ]


def _make_own_charts(logs: Sequence[Log], runs: Sequence[Style]) -> tuple[list[Chart], list[str]]:
    """Render the figures that the runs drew themselves, with a note about each unreadable one."""
    charts: list[Chart] = []
    notes = []
    for log, run in zip(logs, runs, strict=True):
        for path in log.figures:
            try:
                figure = _read_figure(path)
            except (OSError, ValueError) as error:  # noqa: PERF203
                reason = printable(str(error).splitlines()[0])
                notes.append(f"{printable(path)} is not a figure in plotly's JSON format: {reason}")
            else:
                charts.append(Chart(f"own-chart-{len(charts)}", figure, run, printable(path.stem)))
    return charts, notes


def _read_figure(path: Path) -> Any:
    """Read a plotly figure, without properties that this version of plotly does not support.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a figure.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError('it has no list "data"')
    return go.Figure({key: content[key] for key in ("data", "layout", "frames") if key in content}, skip_invalid=True)
