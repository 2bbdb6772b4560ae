"""Running jobs in the terminal, without a clock: the wait of the command writes the next steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import distclip
from distclip.monitor import Recorder
from distclip.monitor.analysis.alarms import find_alarms
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import Keys, read
from distclip.monitor.cli import main
from distclip.monitor.live import marker
from distclip.monitor.live.follow import Follower
from distclip.monitor.live.watch import watch
from distclip.monitor.terminal import Terminal
from tests.logs import HEADER, append, make_line, make_lines, steady_norms, write_run

HOSTILE = "<script>alert(1)</script>[red]\x1b[2J"


def follow(run: Path, *events: Callable[[], object], is_terminal: bool = False, **options: Any) -> str:
    """Watch a run while events happen, one in each wait, and return the output."""
    out, queue = StringIO(), list(events)
    console = Console(file=out, force_terminal=is_terminal, width=100, height=30, color_system=None)
    screen = Terminal(console)
    watch(Follower(run, Keys()), screen, wait=lambda seconds: queue.pop(0)(), **options)
    assert not queue
    return out.getvalue()


def test_watch_prints_changes_and_alarms_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HEADER)
    marker.mark_running(run)
    spike = make_line(6, 50.0, spike=50.0, worst={"tensor": HOSTILE, "rank": 3, "share": 0.9})
    out = follow(
        run,
        lambda: append(run, *make_lines(steady_norms(4))),
        lambda: append(run, text='{"step": 5, "no'),  # a line that is being written
        lambda: append(run, text='rm": 1.0, "bound": 10.0}\n'),
        lambda: append(run, spike),
        lambda: None,
        lambda: (append(run, make_line(7, float("nan"))), marker.mark_ended(run)),
    )
    lines = out.splitlines()
    assert [line.partition(",")[0] for line in lines if line.startswith("step ") and "norm" in line.split(",")[1]] == [
        f"step {n}" for n in (4, 5, 6, 7)
    ]
    assert sum("50 times the median" in line for line in lines) == 1
    assert "on rank 3" in out
    assert "\x1b" not in out
    assert lines[-1] == "the run has ended"


def test_watch_in_a_terminal(tmp_path: Path) -> None:
    header = {**HEADER, "policy": f"global_norm(1.0){HOSTILE}"}
    run = write_run(tmp_path / "run", header, make_lines(steady_norms(300), bound=1.0))
    marker.mark_running(run)
    out = follow(
        run, lambda: append(run, make_line(301, 9.0, spike=9.0)), lambda: marker.mark_ended(run), is_terminal=True
    )
    for text in ("waiting", "global_norm(1.0)<script>", "step 301", "bound 10", "clipped", "█", "9 times the median"):
        assert (text in out) != (text == "waiting"), text
    assert "\x1b[2J" not in out
    assert out.rstrip().endswith("the run has ended") or "the run has ended" in out


def test_watch_once_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", HEADER, make_lines(steady_norms(300), bound=1.0))
    marker.mark_running(run)
    assert main(["watch", str(run), "--once"]) == 0
    out = capsys.readouterr().out
    assert "step 300" in out
    assert "no alarms" in out
    assert main(["watch", str(run), "--once", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["step"], status["bound"], status["is_over"], status["new_alarms"]) == (300, 1.0, False, [])
    assert 0.2 < status["recent_clip_rate"] < 0.8


def test_watch_ends_with_the_process_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HEADER, make_lines(steady_norms(9)))
    marker.mark_running(run)
    content = json.loads((run / marker.FILE).read_text())
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    (run / marker.FILE).write_text(json.dumps({**content, "pid": process.pid}))
    assert follow(run).endswith("the run has ended\n")
    (run / marker.FILE).write_text("{torn")
    assert marker.is_running(run) is None
    (run / marker.FILE).unlink()
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    os.utime(run, (1e9, 1e9))
    assert Follower(run, Keys()).is_over
    empty = write_run(tmp_path / "empty", HEADER)
    marker.mark_running(empty)
    with pytest.raises(RunError, match="no steps"):
        follow(empty, lambda: marker.mark_ended(empty))


def test_recorder_marks_its_run(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = distclip.GradClipper([weight], distclip.global_norm(1.0))
    with Recorder(clipper, tmp_path) as recorder:
        weight.grad = torch.ones(2)
        clipper.clip()
        recorder.flush()
        assert marker.is_running(tmp_path) is True
        assert not Follower(tmp_path, Keys()).is_over
    assert marker.is_running(tmp_path) is False


@pytest.mark.parametrize("arguments", [["watch", "x", "--interval", "0"], ["serve", "x", "--port", "70000"]])
def test_invalid_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Pass" in capsys.readouterr().err


def test_commands_do_not_import_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HEADER, make_lines(steady_norms(60)))
    code = (
        "import sys\n"
        "from distclip.monitor.cli import main\n"
        f"assert main(['watch', {str(run)!r}, '--once']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_alarms_have_their_evidence(tmp_path: Path) -> None:
    culprits = [{"name": "w", "nans": 2, "infs": 0, "ranks": [1]}]
    lines = [
        make_line(1, 1.0),
        make_line(2, 9.0, spike=9.0, worst={"tensor": "w", "rank": None, "share": 0.5}),
        make_line(3, float("nan"), spike=None, culprits=culprits),
        make_line(4, 2.0, spike=2.0),
        make_line(5, 1.0, replicas=[{"name": "w", "ranks": [0]}]),
    ]
    alarms = find_alarms(read(write_run(tmp_path / "run", HEADER, lines)))
    assert [(alarm.step, alarm.kind) for alarm in alarms] == [(2, "spike"), (3, "nonfinite"), (5, "replicas")]
    assert "most of it in w" in alarms[0].text
    assert "w (2 NaN on rank 1)" in alarms[1].text
