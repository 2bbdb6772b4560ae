"""The page in a real browser: charts are drawn, names are shown literally, and the console stays empty."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from distclip.monitor.dashboard import write_page
from distclip.monitor.dashboard.panels import make_panels
from tests.logs import make_full_log

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]

NASTY = "</script><script>document.title='taken'</script><img src=x onerror=console.error('taken')>%{x}$^{_"

LOGS = [make_full_log(suffix=NASTY), make_full_log(name="other", bound=5.0, seed=1)]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,3000 "
    "--virtual-time-budget=20000 --enable-logging=stderr --v=0 --dump-dom"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Open a page of two runs. Return its DOM and the lines of the browser's console."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "own.json").write_text(go.Figure(go.Bar(y=[1, 2, 3])).to_json())
    write_page([replace(LOGS[0], figures=(directory / "own.json",)), LOGS[1]], directory / "page.html")
    return open_page(directory / "page.html")


def open_page(path: Path) -> tuple[str, list[str]]:
    """Return the DOM of a page and the lines of the browser's console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={path.parent / 'profile'}", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def split_charts(dom: str) -> dict[str, str]:
    """Split the DOM at the start of each chart."""
    parts = re.split(r'<div id="([a-z]+-chart(?:-\d+)?)"', dom)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_chart_is_drawn(page: tuple[str, list[str]]) -> None:
    charts = split_charts(page[0])
    assert list(charts) == ["curves-chart", "distribution-chart", "tensors-chart-0", "tensors-chart-1", "own-chart-0"]
    assert all('class="main-svg"' in chart for chart in charts.values())
    # Both runs have a norm, coefficient, clip rate, loss and lr, and marked norms.
    lines = re.findall(r'class="js-line"[^>]* d="M[^"]{20,}', charts["curves-chart"])
    assert len(lines) >= 2 * 5 + 2
    num_marked = sum(len(markers.steps) for markers in make_panels(LOGS)[0][0].markers)
    assert charts["curves-chart"].count('class="point"') == num_marked > 20
    assert len(re.findall(r'class="js-line"[^>]* d="M[^"]{20,}', charts["distribution-chart"])) >= 4
    for name in ("tensors-chart-0", "tensors-chart-1"):
        assert re.search(r'<g class="hm"><image[^>]+href="data:image/png', charts[name])
    assert "layers.*.weight" in charts["tensors-chart-1"]
    assert charts["own-chart-0"].count('<g class="point">') == 3


def test_names_are_shown_literally(page: tuple[str, list[str]]) -> None:
    dom, console = page
    assert "taken" not in re.search(r"<title>(.*?)</title>", dom)[1].replace(escape(NASTY, quote=False), "")  # type: ignore[index]
    assert "<img" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    name = escape(f"run{NASTY}", quote=False)
    assert dom.count(name) > 3
    assert not [line for line in console if "taken" in line]


def test_console_is_empty(page: tuple[str, list[str]]) -> None:
    assert page[1] == []


def test_labels_of_axes(page: tuple[str, list[str]]) -> None:
    labels: dict[str, list[float]] = {}
    for axis, label in re.findall(
        r'class="(y\d*)tick"><text[^>]*>([^<]+)</text>', split_charts(page[0])["curves-chart"]
    ):
        labels.setdefault(axis, []).append(float(label.replace("\N{MINUS SIGN}", "-")))
    assert all(values == sorted(values) for values in labels.values()), labels
    # The norms are on a logarithmic axis, and the learning rate is the constant 0.1.
    assert {0.5, 2.0, 20.0} <= set(labels["y"])
    assert [0.0, 0.1, 0.2] in list(labels.values())


USE_CONTROLS = """<script>
async function use(values) {
  for (const [name, value] of Object.entries(values)) {
    controls[name][typeof value === "boolean" ? "checked" : "value"] = value;
  }
  controls.dispatchEvent(new Event("input"));
  await new Promise((done) => setTimeout(done, 500));
  const { data, layout } = document.getElementById("curves-chart");
  const norms = data.filter((trace) => trace.meta === "norm");
  const axes = [layout.xaxis, layout.yaxis].map(({ type, range, title }) => ({ type, range, title: title.text }));
  const [x, y] = ["x", "y"].map((key) => norms.map((trace) => Array.from(decode(trace[key]))));
  return { axes, x, y };
}
ready.then(async () => {
  const seen = [await use({}), await use({ x: "tokens" }), await use({ x: "step", logx: true, y: "linear" })];
  seen.push(await use({ logx: false, y: "as suited", smoothing: 0.9 }));
  document.body.dataset.seen = JSON.stringify(seen);
});
</script></body>"""


def test_controls(tmp_path: Path) -> None:
    log = make_full_log()
    write_page([log], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").write_text(html.replace("</body>", USE_CONTROLS))
    dom, console = open_page(tmp_path / "page.html")
    assert console == []
    plain, tokens, scaled, smooth = json.loads(unescape(re.search('data-seen="(.*?)"', dom)[1]))  # type: ignore[index]
    assert plain["x"] == [log.steps.tolist()]
    assert tokens["x"] == [log.columns["tokens"].tolist()]
    assert [axis["title"] for axis in tokens["axes"]] == ["tokens", "norm before clipping"]
    assert [axis["type"] for axis in plain["axes"] + scaled["axes"]] == ["linear", "log", "log", "linear"]
    low, high = scaled["axes"][0]["range"]
    assert -0.1 < low < 0 < math.log10(len(log.steps)) < high < math.log10(len(log.steps)) + 0.1
    raw, mean = smooth["y"]
    assert raw == plain["y"][0]
    assert [value is None for value in mean] == [value is None for value in raw]
    assert mean[0] == pytest.approx(raw[0])
    spread = [np.std([math.log(value) for value in values if value is not None]) for values in (raw, mean)]
    assert spread[1] < spread[0] / 2
