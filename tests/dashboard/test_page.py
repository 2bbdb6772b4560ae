"""The page, the PNGs and the table: long and degenerate runs are drawn, and no text of a log is interpreted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from distclip.monitor import dashboard
from distclip.monitor.analysis.log import Log
from distclip.monitor.analysis.spikes import Spike
from distclip.monitor.dashboard import assess, print_summary, write_page, write_pngs
from distclip.monitor.dashboard.charts import draw_curves, draw_heat_map, draw_histograms
from distclip.monitor.dashboard.downsample import bucket_peaks, downsample, sample_evenly
from distclip.monitor.dashboard.histogram import make_histograms
from distclip.monitor.dashboard.palette import GREY, MARKS, RUN_COLOURS, assign_styles
from distclip.monitor.dashboard.panels import make_panels, rolling_rate
from distclip.monitor.dashboard.png import paint
from distclip.monitor.dashboard.spikes import make_spike_rows
from distclip.monitor.dashboard.summary import make_summary
from distclip.monitor.dashboard.tensors import make_heat_maps
from distclip.monitor.dashboard.x_axes import make_x_axes
from tests.logs import make_full_log, make_log

NAN = float("nan")
NASTY = "</script><script>alert(1)</script>&amp;%{x}$^{_$"
"""Name with markup, entities, and templates of plotly and TeX, which must be shown literally."""


def render_page(logs: list[Log], path: Path) -> str:
    """Return the page without plotly.js."""
    write_page(logs, path / "page.html")
    html = (path / "page.html").read_text(encoding="utf-8")
    assert len(html) < 3e6
    html, packed = re.subn(r'(<script type="text/plain" id="plotly">)[A-Za-z0-9+/=]+', r"\1", html)
    assert packed == 1
    return html


def render_summary(logs: list[Log]) -> str:
    out = StringIO()
    print_summary(logs, Console(file=out))
    return out.getvalue()


def summary_cells(logs: list[Log], label: str) -> tuple[str, ...]:
    return next(row.cells for row in make_summary(logs, assess(logs)) if row.label == label)


numbers = st.one_of(st.floats(-1e6, 1e6), st.just(NAN))


@given(st.lists(numbers, min_size=1, max_size=200), st.integers(1, 8), st.data())
@settings(max_examples=60)
def test_downsampling_keeps_extremes(values: list[float], buckets: int, data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=5))
    column = np.array(values)
    indices = downsample(column, buckets, keep)
    assert list(indices) == sorted(set(indices.tolist()))
    assert len(indices) <= 2 * buckets + 2 + len(keep)
    assert {0, len(values) - 1} | set(keep) <= set(indices.tolist())
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    for start, stop in zip(edges, edges[1:], strict=False):
        drawn = column[indices[(indices >= start) & (indices < stop)]]
        if np.isfinite(column[start:stop]).any():
            assert np.nanmax(drawn) == np.nanmax(column[start:stop])
            assert np.nanmin(drawn) == np.nanmin(column[start:stop])
        elif stop > start:
            assert np.isnan(drawn).any(), "a gap stays a gap"


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=200), st.integers(1, 40))
@settings(max_examples=60)
def test_peaks_represent_all_marked_steps(steps: list[tuple[float, bool]], buckets: int) -> None:
    values, marked = np.array([v for v, _ in steps]), np.array([m for _, m in steps])
    finite = marked & np.isfinite(values)
    indices, counts = bucket_peaks(values, marked, buckets)
    assert counts.sum() == finite.sum()
    assert finite[indices].all()
    if finite.any():
        assert values[indices].max() == values[finite].max()


def test_even_sample_has_both_ends() -> None:
    indices = np.arange(10, 5000)
    few = sample_evenly(indices, 7)
    assert len(few) == 7
    assert few[0] == 10
    assert few[-1] == 4999
    assert sample_evenly(indices[:5], 7).tolist() == indices[:5].tolist()


def test_rolling_clip_rate() -> None:
    clipped = np.array([True, True, False, False, False, True])
    np.testing.assert_allclose(rolling_rate(clipped, 2), [NAN, 100, 50, 0, 0, 50])
    assert rolling_rate(clipped[:1], 50).tolist() == [100]


def test_constant_curves_are_inside_of_their_axes() -> None:
    log = make_log(
        [2.0] * 300, clipped=np.ones(300, np.bool_), coefs=np.full(300, 0.5), columns={"lr": np.full(300, 3e-4)}
    )
    panels = make_panels([log])[0]
    figure = draw_curves(panels, assign_styles(["run"]))
    ranges = [figure.layout[f"yaxis{i + 1 if i else ''}"].range for i in range(len(panels))]
    found = dict(zip([panel.key for panel in panels], ranges, strict=True))
    assert found["clip_rate"] == pytest.approx((0, 106))
    assert found["lr"] == pytest.approx((0, 6e-4))


def test_long_run_is_drawn_by_its_extremes(tmp_path: Path) -> None:
    """Spikes, skipped and non-finite steps are drawn, and the page without plotly.js is small."""
    log = make_full_log(200_000)
    norm = make_panels([log])[0][0]
    curve = norm.curves[0]
    assert 37.0 in curve.values
    assert len(curve.steps) < 4500
    assert curve.trend is not None
    assert len(curve.trend.steps) <= 500
    markers = {marker.kind: marker for marker in norm.markers}
    assert 100_001 in markers["skipped"].steps
    assert markers["nonfinite"].steps.tolist() == [66_667]
    assert len(markers["clipped"].steps) <= 400
    assert 37.0 in markers["clipped"].heights
    assert len(render_page([log], tmp_path)) < 1e6


def test_panels_of_the_page(tmp_path: Path) -> None:
    panels = make_panels([make_full_log()])[0]
    assert [panel.key for panel in panels] == ["norm", "coef", "clip_rate", "loss", "lr"]
    assert [panel.log for panel in panels] == [True, False, False, False, False]
    figure = draw_curves(panels, assign_styles(["run"]))
    drawn = [trace.meta for trace in figure.data]
    assert drawn[:5] == ["bound", "norm", "clipped", "skipped", "nonfinite"]
    assert {trace.xaxis for trace in figure.data} == {None}, "all panels share one axis of steps"
    html = render_page([make_full_log()], tmp_path)
    assert re.findall(r'<div id="([a-z-]+)-chart', html) == ["curves", "distribution", "tensors"]


def test_run_has_the_same_colour_on_all_charts() -> None:
    logs = [make_full_log(name="a"), make_full_log(name="b", bound=5.0, seed=1)]
    runs = assign_styles([log.name for log in logs])
    assert [run.colour for run in runs] == RUN_COLOURS[:2]
    for figure in (draw_curves(make_panels(logs)[0], runs), draw_histograms(make_histograms(logs), runs)):
        for run in runs:
            own = [trace for trace in figure.data if trace.legendgroup == run.name]
            colours = {trace.line.color or trace.marker.color for trace in own}
            assert colours == {run.colour}
    seeds = assign_styles([f"{kind}/seed={seed}" for kind in ("clipped", "unclipped") for seed in range(10)])
    assert {run.colour for run in seeds} == set(RUN_COLOURS[:2])
    assert [run.group for run in seeds if run.first] == ["clipped (10 runs)", "unclipped (10 runs)"]
    names = [f"policy {letter}" for letter in "abcdefghij"]
    assert len({(run.colour, run.dashed) for run in assign_styles(names)}) == 10
    assert len({run.group for run in assign_styles(["same", "same"])}) == 2


def test_summary_cells() -> None:
    logs = [make_full_log(name="a"), make_log([1.0, NAN, 3.0, 4.0], name="b", unreadable=2, summary={"held_out": None})]
    assert summary_cells(logs, "steps") == ("400", "4")
    assert summary_cells(logs, "norm, max") == ("37", "4")
    assert summary_cells(logs, "norm, median")[1] == "3"
    assert summary_cells(logs, "not finite") == ("1 (0.2 %)", "1 (25 %)")
    assert summary_cells(logs, "skipped") == ("2 (0.5 %)", "0")
    assert summary_cells(logs, "bound") == ("1", "-")
    assert summary_cells(logs, "held-out loss") == ("2.02", "not finite")
    assert summary_cells(logs, "batch") == ("20", "-")
    assert summary_cells(logs, "unreadable lines") == ("-", "2")
    labels = [row.label for row in make_summary(logs, assess(logs))]
    assert "held-out R²" not in labels, "no run has a value"
    ended = make_log([1.0] * 100, columns={"loss": np.r_[np.full(12, 2.0), np.full(88, NAN)]})
    assert summary_cells([ended], "loss, last") == ("2 (step 12)",)


def test_histogram() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 5000))
    (histogram,) = make_histograms([make_log([*norms, NAN, 0.0], bounds=np.full(5002, 2.0))])
    assert histogram.shares.sum() == pytest.approx(100)
    assert histogram.bound == 2.0
    for level, (norm, _) in histogram.quantiles.items():
        assert norm == pytest.approx(np.percentile(norms, level))


def test_heat_map_of_many_tensors() -> None:
    """The largest tensors are drawn in the model's order, with names without their common parts."""
    norms = np.full((1000, 300), 0.1)
    norms[:, 250] = 5.0
    norms[700, 3] = 9.0
    names = tuple(f"model.layers.{i}.weight" for i in range(300))
    log = make_log([1.0] * 1000, tensors=names, tensor_steps=np.arange(1, 1001), tensor_norms=norms)
    (heat_map,), _ = make_heat_maps([log])
    assert len(heat_map.names) == 40
    assert heat_map.num_hidden == 260
    assert {names[250], names[3]} <= set(heat_map.names)
    assert list(heat_map.names) == sorted(heat_map.names, key=names.index)
    assert heat_map.labels[heat_map.names.index(names[250])] == "250"
    assert heat_map.pattern == "model.layers.*.weight"
    assert heat_map.logs.max() == pytest.approx(np.log10(9.0))
    assert heat_map.logs.size <= 36_000
    assert draw_heat_map(heat_map).data[0].type == "heatmap"


def test_table_of_spikes_and_nonfinite_steps() -> None:
    rows, notes = make_spike_rows([make_full_log()])
    assert [(row.step, row.norm, row.ratio) for row in rows] == [(134, "not finite", "-"), (201, "37", "61 x")]
    assert rows[0].culprits == "layers.3.weight (2 NaN and 1 Inf on ranks 0, 1)"
    assert rows[1].tensor == "layers.2.weight (93 % of the squared norm)"
    assert rows[1].rank == "1"
    assert not notes
    rows, notes = make_spike_rows([make_log([NAN] * 100)])
    assert len(rows) == 25
    assert "the first 25 of 100" in notes[0]


DEGENERATE: dict[str, Callable[[], list[Log]]] = {
    "one step": lambda: [make_log([1.0])],
    "no finite norm": lambda: [make_log([NAN] * 30)],
    "norms of 0": lambda: [make_log([0.0] * 30)],
    "constant norm": lambda: [make_log([2.0] * 300)],
    "extreme norms": lambda: [make_log([1e300, 1e-300, NAN])],
    "large step number": lambda: [make_log([1.0, 2.0], steps=np.array([1, 2**40]))],
    "columns without numbers": lambda: [
        make_log([1.0] * 30, columns={"loss": np.full(30, NAN), "gone": np.full(30, NAN)})
    ],
    "many columns": lambda: [make_log([1.0] * 30, columns={f"_c{i}": np.arange(30.0) - 3 for i in range(20)})],
    "losses in one of two runs": lambda: [make_full_log(30), make_log([1.0] * 3)],
    "tensors of one step": lambda: [
        make_log([1.0], tensors=("a", "a"), tensor_steps=np.array([1]), tensor_norms=np.array([[0.5, NAN]]))
    ],
    "invalid summary": lambda: [
        make_log(
            [1.0] * 3, summary={"held_out": [1], "guess": {}, "r2": "x"}, header={"policy": {"a": 1}, "slots": [1]}
        )
    ],
    "unusual characters": lambda: [make_full_log(30, suffix="漢字\ud800\x1b[31m"), make_full_log(30, name="_hidden")],
    "always clipped": lambda: [make_full_log(300, bound=1e-3)],
    "ten seeds of two policies": lambda: [
        make_full_log(60, name=f"{kind}/{seed}", seed=seed) for kind in "ab" for seed in range(10)
    ],
}


@pytest.mark.parametrize("case", list(DEGENERATE))
def test_degenerate_runs_are_drawn(case: str, tmp_path: Path) -> None:
    logs = DEGENERATE[case]()
    html = render_page(logs, tmp_path)
    assert 'id="curves-chart"' in html
    assert render_summary(logs)
    drawn = [*draw_curves(make_panels(logs)[0], assign_styles([log.name for log in logs])).data]
    assert {trace.meta for trace in drawn} >= {"norm"}


@pytest.mark.parametrize("case", ["no finite norm", "norms of 0", "extreme norms", "unusual characters"])
def test_pngs_of_degenerate_runs(case: str, tmp_path: Path) -> None:
    assert write_pngs(DEGENERATE[case](), tmp_path)


def test_page_notes_missing_values(tmp_path: Path) -> None:
    html = render_page([make_log([NAN] * 30)], tmp_path)
    for note in ("No norm was finite.", "No bound was recorded.", "No step was clipped.", "No loss was recorded."):
        assert note in html
    assert "No per-tensor norms were recorded." in html
    assert "No norm is above 0." in html
    assert "No loss was recorded in other." in render_page(
        [make_full_log(30), make_log([1.0] * 3, name="other")], tmp_path
    )
    # The analysis suggests no bound for so few steps.
    assert assess([make_log([NAN] * 30)])[0].text in unescape(html)


class Reader(HTMLParser):
    """Collects the elements of a page, and its text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.texts.append(data)


def parse(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_names_are_not_interpreted(tmp_path: Path) -> None:
    plain, nasty = (
        parse(render_page([make_full_log(suffix=suffix), make_full_log(name="b", suffix=suffix)], tmp_path))
        for suffix in ("", NASTY)
    )
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in plain.tags]
    text = "".join(nasty.texts)
    for name in (
        f"run{NASTY}",
        f"NormPolicy(…){NASTY}",
        f"site{NASTY.replace('_', ' ')}",
        f"layers.2.weight{NASTY}",
        f"id{NASTY}",
    ):
        assert name in text
    assert len(write_pngs([make_full_log(suffix=NASTY)], tmp_path)) == 5
    assert f"layers.2.weight{NASTY}" in make_spike_rows([make_full_log(suffix=NASTY)])[0][1].tensor


def test_page_loads_nothing(tmp_path: Path) -> None:
    figure = go.Figure(go.Bar(y=[1, 2]), layout={"title": {"text": "own"}})
    (tmp_path / "own.json").write_text(figure.to_json())
    html = render_page([make_full_log(figures=(tmp_path / "own.json",))], tmp_path)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org)""", html)
    policy = next(attrs["content"] for tag, attrs in parse(html).tags if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert 'id="own-chart-0"' in html


def test_invalid_figures_are_noted(tmp_path: Path) -> None:
    for name, text in {
        "torn": '{"data": [',
        "foreign": "[1, 2]",
        "other": json.dumps({"data": [{"type": "pie?"}]}),
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    paths = (*sorted(tmp_path.glob("*.json")), tmp_path / "gone.json")
    html = render_page([make_full_log(30, figures=paths)], tmp_path)
    for name in ("torn", "foreign", "gone"):
        assert re.search(rf"{name}\.json is not a figure in plotly", html), name


def test_pngs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have the expected names, and none of them is empty."""
    # pyplot would look for a display.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    logs = [make_full_log(), make_full_log(name="b", bound=5.0, seed=1)]
    paths = write_pngs(logs, tmp_path / "new")
    assert [path.stem for path in paths] == [
        "norm_and_loss",
        "clipping",
        "columns",
        "distribution",
        "tensors_1",
        "tensors_2",
    ]
    blue = np.array([0x00, 0x77, 0xBB]) / 255
    for path in paths:
        image = imread(path)[..., :3]
        assert min(image.shape[:2]) > 250
        assert image.std() > 0.03
        if "tensors" not in path.stem:
            assert (np.abs(image - blue).max(axis=2) < 0.02).sum() > 50, f"no line of the first run in {path.name}"


def test_printed_summary() -> None:
    text = render_summary([make_full_log(name="with clipping"), make_full_log(name="[bold]b", seed=1)])
    assert "\x1b" not in text
    assert "[bold]b" in text
    lines = text.splitlines()
    assert max(map(len, lines)) < 400
    assert "clip rate" in text
    assert "held-out loss" in text
    many = render_summary(
        [make_full_log(60, name=f"{kind}/seed={seed}", seed=seed) for kind in "ab" for seed in range(10)]
    )
    tables = [line for line in many.splitlines() if re.match(r" +[ab]/seed", line)]
    assert len(tables) > 1
    assert 80 < max(map(len, tables)) <= 120
    findings = [
        line for line in render_summary([replace(make_full_log(bound=1e-2), name="x")]).splitlines() if ": " in line
    ]
    assert any(re.search("clip", line, re.IGNORECASE) for line in findings), "a clip rate of 100 % is a finding"


def test_spikes_are_sorted_by_size_and_folded(tmp_path: Path) -> None:
    """Non-finite steps come first, then the largest spikes of all runs. Ten are visible."""
    spikes = [tuple(Spike(10 * i + 3, 3.0, 2.0 + (7 * i) % 13 + run / 2) for i in range(1, 13)) for run in range(2)]
    logs = [replace(make_full_log(name=f"run {run}"), spikes=spikes[run]) for run in range(2)]
    rows, _ = make_spike_rows(logs)
    ratios = [float(row.ratio.removesuffix(" x")) for row in rows if row.ratio != "-"]
    assert ratios == sorted(ratios, reverse=True)
    assert [row.norm for row in rows].index("3") == 2
    write_page(logs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    head, _, tail = text[text.index('<section id="spikes">') :].partition("<details>")
    assert head.count("<tr>") == 1 + 10
    assert f"<summary>{len(rows) - 10} smaller ones</summary>" in tail
    assert tail.count("<tr>") == 1 + len(rows) - 10


@pytest.mark.parametrize("num_runs", [1, 2, 6])
def test_one_label_for_all_panels(num_runs: int) -> None:
    logs = [make_full_log(name=f"run {run}", seed=run) for run in range(num_runs)]
    figure = draw_curves(make_panels(logs)[0], assign_styles([log.name for log in logs]))
    unified = num_runs < 5
    assert (figure.layout.hovermode, figure.layout.hoversubplots) == (
        ("x unified", "axis") if unified else ("closest", None)
    )
    labels = [trace.hovertemplate for trace in figure.data if trace.hovertemplate]
    assert all(label.startswith("step %{x:,d}: ") != unified for label in labels)
    num_curves = sum(len(panel.curves) for panel in make_panels(logs)[0])
    assert figure.layout.meta["smooth"].count("whole") == num_curves
    assert len(figure.layout.meta["runs"]) == len(figure.data)


def test_axes_of_the_curves() -> None:
    """Tokens and time are axes where all runs have them, whether tokens are counted per step or from the start."""
    steps, time = np.arange(1.0, 10_001), 1.7e9 + np.arange(10_000) * 2.0
    total, each = (
        make_log([1.0] * 10_000, columns=columns)
        for columns in (
            {"num_input_tokens_seen": 512 * steps, "time": time},
            {"tokens": np.full(10_000, 512.0), "time": time + 7},
        )
    )
    for logs in ([total], [each], [total, each]):
        tokens, hours = make_x_axes(logs)
        assert (tokens.title, hours.title) == ("tokens", "hours since the first step")
        for run in range(len(logs)):
            assert np.interp(5000, tokens.steps[run], tokens.positions[run]) == pytest.approx(512 * 5000)
            assert np.interp(5001, hours.steps[run], hours.positions[run]) == pytest.approx(10_000 / 3600)
        assert sum(map(len, tokens.steps)) <= 4000
        # The tokens of a step are a curve. Those since the start would be a straight line.
        drawn = [panel.key for panel in make_panels(logs)[0]]
        assert ("tokens" in drawn, "num_input_tokens_seen" in drawn) == (any(log is each for log in logs), False)
    assert make_x_axes([total, make_log([1.0] * 3)]) == []
    assert make_x_axes([make_log([1.0], columns={"tokens": np.ones(1), "time": np.ones(1)})]) == []


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours by the rules of WCAG."""
    levels = []
    for colour in (first, second):
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
        levels.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("colour", [*RUN_COLOURS, GREY, *(mark.colour for mark in MARKS.values())])
def test_colours_are_visible_in_both_themes(colour: str) -> None:
    cards = re.findall("--card: (#[0-9a-f]{6})", Path(dashboard.__file__).with_name("page.css").read_text())
    assert len(cards) == 2
    assert all(contrast(colour, card) >= 3 for card in cards)


def test_pngs_show_the_figures_of_the_page() -> None:
    """Points, colours, scales and texts of a PNG are those of the page's figure."""
    logs = [make_full_log(name="a <b>"), make_full_log(name="b", bound=5.0, seed=1)]
    runs = assign_styles([log.name for log in logs])
    for figure in (draw_curves(make_panels(logs)[0], runs), draw_histograms(make_histograms(logs), runs)):
        painted = paint(figure)
        lines = [line for axes in painted.axes for line in axes.lines]
        traces = [trace for trace in figure.data if trace.x[0] is not None]
        traces.sort(key=lambda trace: int((trace.yaxis or "y")[1:] or 1))
        assert len(lines) == len(traces)
        for line, trace in zip(lines, traces, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), trace.x)
            np.testing.assert_array_equal(line.get_ydata(), trace.y)
            assert line.get_color() == (trace.line.color or trace.marker.color)
        for i, axes in enumerate(painted.axes):
            axis = figure.layout[f"yaxis{i + 1 if i else ''}"]
            assert axes.get_yscale() == (axis.type or "linear")
            assert axes.get_ylabel() == axis.title.text.replace("<br>", "\n")
        texts = {text.get_text() for text in painted.legends[0].get_texts()}
        assert {"a <b>", "b", "bound"} <= texts


def test_rows_that_are_equal_in_all_runs_are_folded(tmp_path: Path) -> None:
    logs = [make_full_log(name="a"), make_full_log(name="b", bound=5.0, seed=1)]
    for shown, has_fold in ((logs, True), (logs[:1], False)):
        html = render_page(shown, tmp_path)
        section = html[html.index('<section id="summary">') : html.index('<section id="spikes">')]
        head, fold, tail = section.partition("<details>")
        assert bool(fold) is has_fold
        assert ">batch</th>" in (tail if has_fold else head)
        assert ">clip rate</th>" in head
