"""Running jobs in the browser: the report over HTTP on a free port of this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from distclip.monitor.analysis.log import Keys
from distclip.monitor.cli import main
from distclip.monitor.live import marker
from tests.logs import HEADER, append, make_line, make_lines, steady_norms, write_run

uvicorn = pytest.importorskip("uvicorn", reason="distclip[serve] is not installed")

HOSTILE = "<script>alert(1)</script>[red]\x1b[2J"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a run with a hostile name, and return its directory and the address with the token."""
    header = {**HEADER, "policy": HOSTILE}
    run = write_run(tmp_path / "<script>run", header, make_lines(steady_norms(300), bound=1.0))
    marker.mark_running(run)
    from distclip.monitor.live.serve import Page, listen, make_app

    with listen("127.0.0.1", 0) as listener:
        app = make_app(Page([tmp_path], Keys()), "token")
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield run, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_serve_follows_runs(served: tuple[Path, str]) -> None:
    run, url = served
    status, page = get(f"{url}/token/")
    assert status == 200
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<script>run" not in page
    assert len(page) < 1_000_000, "plotly.js is another file"
    assert len(get(f"{url}/token/plotly.js")[1]) > 1_000_000
    assert "showAll" in get(f"{url}/token/live.js")[1]
    first = json.loads(get(f"{url}/token/data")[1])
    assert json.loads(first["figures"]["curves-chart"])["data"]
    assert first["is_over"] is False
    assert get(f"{url}/token/data?version={first['version']}") == (204, "")
    append(run, make_line(301, 50.0, spike=50.0))
    marker.mark_ended(run)
    second = json.loads(get(f"{url}/token/data?version={first['version']}")[1])
    assert second["version"] != first["version"]
    assert second["figures"].keys() == first["figures"].keys()
    assert "301" in second["html"]
    assert second["is_over"] is True
    # A second run appears below the directory, and a file is torn.
    write_run(run.parent / "later", HEADER, make_lines(steady_norms(60)))
    append(run, text='{"step": 3')
    assert "later" in json.loads(get(f"{url}/token/data")[1])["html"]


@pytest.mark.parametrize(
    "path", ["/", "/tokem/", "/tokem/data", "/tokem/plotly.js", "/token/../token2/", "/token/x", "//"]
)
def test_serve_answers_nothing_without_the_token(served: tuple[Path, str], path: str) -> None:
    status, text = get(served[1] + path)
    assert status == 404
    assert text == "Not Found"


def test_serve_ends_with_an_interrupt(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HEADER)
    command = [sys.executable, "-u", "-m", "distclip.monitor", "serve", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().removeprefix("page: ").strip()
        assert url.startswith("http://127.0.0.1:")
        assert len(url.split("/")[3]) >= 32
        status, text = get(url)  # there is no step yet
        assert "no steps" in text
        assert status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), out


def test_serve_refuses_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distclip.monitor.live.serve import listen

    run = write_run(tmp_path / "run", HEADER, make_lines(steady_norms(60)))
    with listen("127.0.0.1", 0) as listener:
        assert main(["serve", str(run), "--port", str(listener.getsockname()[1])]) == 1
    assert "--port 0" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_server_does_not_import_torch() -> None:
    code = "import sys, distclip.monitor.live.serve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
