"""The page in a real browser: its charts are drawn, its names are seen as they are, and nothing goes wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html import escape

import plotly.graph_objects as go
import pytest

from distclip.monitor.dashboard import write_page
from distclip.monitor.dashboard.series import panels
from tests.logs import full

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

NASTY = "</script><script>document.title='taken'</script><img src=x onerror=console.error('taken')>%{x}$^{_"

LOGS = [full(extra=NASTY), full(name="other", bound=5.0, seed=1)]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,3000 "
    "--virtual-time-budget=20000 --enable-logging=stderr --v=0 --dump-dom"
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """What a page of two runs has become, and what the browser's console says."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "own.json").write_text(go.Figure(go.Bar(y=[1, 2, 3])).to_json())
    write_page([replace(LOGS[0], figures=(directory / "own.json",)), LOGS[1]], directory / "page.html")
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={directory / 'profile'}", f"file://{directory}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def charts(dom: str) -> dict[str, str]:
    """What is in the page, from the beginning of each chart to that of the next."""
    parts = re.split(r'<div id="([a-z]+-chart(?:-\d+)?)"', dom)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_chart_is_drawn(opened: tuple[str, list[str]]) -> None:
    found = charts(opened[0])
    assert list(found) == ["curves-chart", "distribution-chart", "tensors-chart-0", "tensors-chart-1", "own-chart-0"]
    assert all('class="main-svg"' in chart for chart in found.values())
    # Of both runs: norm, coefficient, clip rate, loss, lr and tokens, which have a name each, and marks on the norms.
    lines = re.findall(r'class="js-line"[^>]* d="M[^"]{20,}', found["curves-chart"])
    assert len(lines) >= 2 * 6 + 2
    marked = sum(len(mark.steps) for mark in panels(LOGS)[0][0].marks)
    assert found["curves-chart"].count('class="point"') == marked > 20
    assert len(re.findall(r'class="js-line"[^>]* d="M[^"]{20,}', found["distribution-chart"])) >= 4
    for name in ("tensors-chart-0", "tensors-chart-1"):
        assert re.search(r'<g class="hm"><image[^>]+href="data:image/png', found[name])
    assert "layers.*.weight" in found["tensors-chart-1"]
    assert found["own-chart-0"].count('<g class="point">') == 3


def test_names_are_seen_as_they_are(opened: tuple[str, list[str]]) -> None:
    dom, console = opened
    assert "taken" not in re.search(r"<title>(.*?)</title>", dom)[1].replace(escape(NASTY, quote=False), "")  # type: ignore[index]
    assert "<img" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    seen = escape(f"run{NASTY}", quote=False)
    assert dom.count(seen) > 3
    assert not [line for line in console if "taken" in line]


def test_the_console_is_silent(opened: tuple[str, list[str]]) -> None:
    assert opened[1] == []
