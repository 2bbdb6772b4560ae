"""The page, the pictures and the table: what is drawn of long and of strange runs; nothing in a log is code."""

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
from plotly.offline import get_plotlyjs
from rich.console import Console

from distclip.monitor.analysis.log import Log
from distclip.monitor.dashboard import overview, write_page, write_pictures
from distclip.monitor.dashboard.charts import distribution, over_steps, tensor_norms
from distclip.monitor.dashboard.distribution import histograms
from distclip.monitor.dashboard.facts import facts
from distclip.monitor.dashboard.palette import RUNS, styles
from distclip.monitor.dashboard.series import panels, rolling
from distclip.monitor.dashboard.spikes import rows
from distclip.monitor.dashboard.tensors import heat_maps
from distclip.monitor.dashboard.thinning import crests, sample, thin
from distclip.monitor.dashboard.verdicts import verdicts
from tests.logs import bare, full

NAN = float("nan")
NASTY = "</script><script>alert(1)</script>&amp;%{x}$^{_$"
"""Markup, entities, plotly's and TeX's: all of it a name that is to be seen as it is."""


def page(logs: list[Log], path: Path) -> str:
    """Without plotly.js, which is 4.8 MB."""
    write_page(logs, path / "page.html")
    return (path / "page.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def table(logs: list[Log]) -> str:
    out = StringIO()
    overview(logs, Console(file=out))
    return out.getvalue()


def fact(logs: list[Log], label: str) -> tuple[str, ...]:
    return next(each.cells for each in facts(logs, verdicts(logs)) if each.label == label)


numbers = st.one_of(st.floats(-1e6, 1e6), st.just(NAN))


@given(st.lists(numbers, min_size=1, max_size=200), st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_what_sticks_out(values: list[float], buckets: int, data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=5))
    column = np.array(values)
    places = thin(column, buckets, keep)
    assert list(places) == sorted(set(places.tolist()))
    assert len(places) <= 2 * buckets + 2 + len(keep)
    assert {0, len(values) - 1} | set(keep) <= set(places.tolist())
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    for start, stop in zip(edges, edges[1:], strict=False):
        drawn = column[places[(places >= start) & (places < stop)]]
        if np.isfinite(column[start:stop]).any():
            assert np.nanmax(drawn) == np.nanmax(column[start:stop])
            assert np.nanmin(drawn) == np.nanmin(column[start:stop])
        elif stop > start:
            assert np.isnan(drawn).any(), "a gap stays a gap"


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=200), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_marks_stand_for_all_steps(steps: list[tuple[float, bool]], buckets: int) -> None:
    values, marked = np.array([v for v, _ in steps]), np.array([m for _, m in steps])
    there = marked & np.isfinite(values)
    places, counts = crests(values, marked, buckets)
    assert counts.sum() == there.sum() and there[places].all()
    if there.any():
        assert values[places].max() == values[there].max()


def test_sample_has_both_ends() -> None:
    places = np.arange(10, 5000)
    few = sample(places, 7)
    assert len(few) == 7 and few[0] == 10 and few[-1] == 4999
    assert sample(places[:5], 7).tolist() == places[:5].tolist()


def test_rolling_clip_rate() -> None:
    happened = np.array([True, True, False, False, False, True])
    np.testing.assert_allclose(rolling(happened, 2), [NAN, 100, 50, 0, 0, 50])
    assert rolling(happened[:1], 50).tolist() == [100]


def test_a_long_run_is_drawn_by_its_extremes(tmp_path: Path) -> None:
    """What stood out, was skipped or not finite is there; the page is plotly.js and little more."""
    log = full(200_000)
    norm = panels([log])[0][0]
    line = norm.lines[0]
    assert 37.0 in line.values and len(line.steps) < 4500 and line.trend is not None and len(line.trend.steps) <= 500
    marks = {mark.kind: mark for mark in norm.marks}
    assert 100_001 in marks["skipped"].steps and marks["nonfinite"].steps.tolist() == [66_667]
    assert len(marks["clipped"].steps) <= 400 and 37.0 in marks["clipped"].heights
    assert len(page([log], tmp_path)) < 1e6


def test_columns_of_the_page(tmp_path: Path) -> None:
    found = panels([full()])[0]
    assert [panel.key for panel in found] == ["norm", "coef", "clip_rate", "loss", "lr", "tokens"]
    assert [panel.log for panel in found] == [True, False, False, False, False, False]
    figure = over_steps(found, styles(["run"]))
    drawn = [trace.meta for trace in figure.data]
    assert drawn[:5] == ["bound", "norm", "clipped", "skipped", "nonfinite"]
    assert {trace.xaxis for trace in figure.data} == {None}, "one axis of steps for all"
    html = page([full()], tmp_path)
    assert re.findall(r'<div id="([a-z-]+)-chart', html) == ["curves", "distribution", "tensors"]


def test_same_colour_everywhere() -> None:
    logs = [full(name="a"), full(name="b", bound=5.0, seed=1)]
    runs = styles([log.name for log in logs])
    assert [run.colour for run in runs] == RUNS[:2]
    for figure in (over_steps(panels(logs)[0], runs), distribution(histograms(logs), runs)):
        for run in runs:
            own = [trace for trace in figure.data if trace.legendgroup == run.name]
            colours = {trace.line.color or trace.marker.color for trace in own}
            assert colours == {run.colour}
    seeds = styles([f"{kind}/seed={seed}" for kind in ("clipped", "unclipped") for seed in range(10)])
    assert {run.colour for run in seeds} == set(RUNS[:2])
    assert [run.group for run in seeds if run.first] == ["clipped (10 runs)", "unclipped (10 runs)"]
    names = [f"policy {letter}" for letter in "abcdefghij"]
    assert len({(run.colour, run.dashed) for run in styles(names)}) == 10
    assert len({run.group for run in styles(["same", "same"])}) == 2


def test_facts() -> None:
    logs = [full(name="a"), bare([1.0, NAN, 3.0, 4.0], name="b", torn=2, summary={"held_out": None})]
    assert fact(logs, "steps") == ("400", "4")
    assert fact(logs, "norm, max") == ("37", "4")
    assert fact(logs, "norm, median")[1] == "3"
    assert fact(logs, "not finite") == ("1 (0.2 %)", "1 (25 %)")
    assert fact(logs, "skipped") == ("2 (0.5 %)", "0")
    assert fact(logs, "bound") == ("1", "-")
    assert fact(logs, "held-out loss") == ("2.02", "not finite")
    assert fact(logs, "batch") == ("20", "-")
    assert fact(logs, "lines that could not be read") == ("-", "2")
    assert not [each for each in facts(logs, verdicts(logs)) if each.label == "held-out R²"], "neither has any"
    ended = bare([1.0] * 100, columns={"loss": np.r_[np.full(12, 2.0), np.full(88, NAN)]})
    assert fact([ended], "loss, last") == ("2 (step 12)",)


def test_histogram() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 5000))
    found = histograms([bare([*norms, NAN, 0.0], bounds=np.full(5002, 2.0))])[0]
    assert found.shares.sum() == pytest.approx(100) and found.bound == 2.0
    for level, (norm, _) in found.quantiles.items():
        assert norm == pytest.approx(np.percentile(norms, level))


def test_heat_map_of_many_tensors() -> None:
    """The largest, in the model's order, and names without what all have alike."""
    norms = np.full((1000, 300), 0.1)
    norms[:, 250] = 5.0
    norms[700, 3] = 9.0
    names = tuple(f"model.layers.{i}.weight" for i in range(300))
    log = bare([1.0] * 1000, tensors=names, tensor_steps=np.arange(1, 1001), tensor_norms=norms)
    (found,), _ = heat_maps([log])
    assert len(found.names) == 40 and found.left_out == 260
    assert {names[250], names[3]} <= set(found.names) and list(found.names) == sorted(found.names, key=names.index)
    assert found.labels[found.names.index(names[250])] == "250" and found.pattern == "model.layers.*.weight"
    assert found.logs.max() == pytest.approx(np.log10(9.0)) and found.logs.size <= 36_000
    assert tensor_norms(found).data[0].type == "heatmap"


def test_spikes_and_culprits_are_one_table() -> None:
    found, notes = rows([full()])
    assert [(row.step, row.norm, row.ratio) for row in found] == [(134, "not finite", "-"), (201, "37", "61 x")]
    assert found[0].nonfinite == "layers.3.weight (2 NaN and 1 Inf, ranks 0, 1)"
    assert found[1].tensor == "layers.2.weight (93 % of the squared norm)" and found[1].rank == "1"
    assert not notes
    many = bare([NAN] * 100)
    found, notes = rows([many])
    assert len(found) == 25 and "the first 25 of 100" in notes[0]


DEGENERATE: dict[str, Callable[[], list[Log]]] = {
    "one step": lambda: [bare([1.0])],
    "no norm": lambda: [bare([NAN] * 30)],
    "norms of zero": lambda: [bare([0.0] * 30)],
    "one norm": lambda: [bare([2.0] * 300)],
    "as large as can be": lambda: [bare([1e300, 1e-300, NAN])],
    "a late step": lambda: [bare([1.0, 2.0], steps=np.array([1, 2**40]))],
    "columns without numbers": lambda: [bare([1.0] * 30, columns={"loss": np.full(30, NAN), "gone": np.full(30, NAN)})],
    "many columns": lambda: [bare([1.0] * 30, columns={f"_c{i}": np.arange(30.0) - 3 for i in range(20)})],
    "one of two with losses": lambda: [full(30), bare([1.0] * 3)],
    "tensors once": lambda: [
        bare([1.0], tensors=("a", "a"), tensor_steps=np.array([1]), tensor_norms=np.array([[0.5, NAN]]))
    ],
    "a strange summary": lambda: [
        bare([1.0] * 3, summary={"held_out": [1], "guess": {}, "r2": "x"}, header={"policy": {"a": 1}, "slots": [1]})
    ],
    "letters of any script": lambda: [full(30, extra="漢字\ud800\x1b[31m"), full(30, name="_hidden")],
    "always clipped": lambda: [full(300, bound=1e-3)],
    "ten seeds of two": lambda: [full(60, name=f"{kind}/{seed}", seed=seed) for kind in "ab" for seed in range(10)],
}


@pytest.mark.parametrize("case", list(DEGENERATE))
def test_nothing_to_show_is_no_failure(case: str, tmp_path: Path) -> None:
    logs = DEGENERATE[case]()
    html = page(logs, tmp_path)
    assert 'id="curves-chart"' in html
    assert table(logs)
    drawn = [*over_steps(panels(logs)[0], styles([log.name for log in logs])).data]
    assert {trace.meta for trace in drawn} >= {"norm"}


@pytest.mark.parametrize("case", ["no norm", "norms of zero", "as large as can be", "letters of any script"])
def test_pictures_of_next_to_nothing(case: str, tmp_path: Path) -> None:
    assert write_pictures(DEGENERATE[case](), tmp_path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    html = page([bare([NAN] * 30)], tmp_path)
    for said in ("No norm was finite.", "No bound was recorded.", "No step was clipped.", "No loss was recorded."):
        assert said in html
    assert "No norms of single tensors were recorded." in html and "No norm is above 0." in html
    assert "No loss was recorded in other." in page([full(30), bare([1.0] * 3, name="other")], tmp_path)
    # Of so few steps the analysis suggests no bound.
    assert verdicts([bare([NAN] * 30)])[0].text in unescape(html)


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, and its words outside scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_names_are_no_code(tmp_path: Path) -> None:
    plain, nasty = (read(page([full(extra=extra), full(name="b", extra=extra)], tmp_path)) for extra in ("", NASTY))
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in plain.tags]
    words = "".join(nasty.words)
    for name in (
        f"run{NASTY}",
        f"NormPolicy(…){NASTY}",
        f"site{NASTY.replace('_', ' ')}",
        f"layers.2.weight{NASTY}",
        f"id{NASTY}",
    ):
        assert name in words
    assert len(write_pictures([full(extra=NASTY)], tmp_path)) == 5
    assert f"layers.2.weight{NASTY}" in rows([full(extra=NASTY)])[0][1].tensor


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    figure = go.Figure(go.Bar(y=[1, 2]), layout={"title": {"text": "own"}})
    (tmp_path / "own.json").write_text(figure.to_json())
    html = page([full(figures=(tmp_path / "own.json",))], tmp_path)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org)""", html)
    policy = next(attrs["content"] for tag, attrs in read(html).tags if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy
    assert 'id="own-chart-0"' in html


def test_a_figure_that_is_none(tmp_path: Path) -> None:
    for name, text in {
        "torn": '{"data": [',
        "foreign": "[1, 2]",
        "other": json.dumps({"data": [{"type": "pie?"}]}),
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    paths = (*sorted(tmp_path.glob("*.json")), tmp_path / "gone.json")
    html = page([full(30, figures=paths)], tmp_path)
    for name in ("torn", "foreign", "gone"):
        assert re.search(rf"{name}\.json is not a figure in plotly", html), name


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what they are called, and there is something on each."""
    # It would look for a display.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    logs = [full(), full(name="b", bound=5.0, seed=1)]
    paths = write_pictures(logs, tmp_path / "new")
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
        assert min(image.shape[:2]) > 250 and image.std() > 0.03
        if "tensors" not in path.stem:
            assert (np.abs(image - blue).max(axis=2) < 0.02).sum() > 50, f"no line of the first run in {path.name}"


def test_overview() -> None:
    text = table([full(name="with clipping"), full(name="[bold]b", seed=1)])
    assert "\x1b" not in text and "[bold]b" in text
    lines = text.splitlines()
    assert max(map(len, lines)) < 400 and "clip rate" in text and "held-out loss" in text
    many = table([full(60, name=f"{kind}/seed={seed}", seed=seed) for kind in "ab" for seed in range(10)])
    tables = [line for line in many.splitlines() if re.match(r" +[ab]/seed", line)]
    assert len(tables) > 1 and 80 < max(map(len, tables)) <= 120
    findings = [line for line in table([replace(full(bound=1e-2), name="x")]).splitlines() if ": " in line]
    assert any(re.search("clip", line, re.IGNORECASE) for line in findings), "a clip rate of 100 % is worth a line"
