"""`distclip suggest`, `diagnose`, `blame` and `report` as one types them."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import distclip
from distclip.monitor import cli, dashboard
from distclip.monitor.analysis.blame import blame
from distclip.monitor.analysis.log import Log, read
from distclip.monitor.cli import main
from distclip.monitor.terminal import Terminal
from tests.analysis.by_hand import HEADER, bad_record, rows, usual, written

ROOT = Path(distclip.__file__).parents[1]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory of two runs, whose names are long."""
    written(tmp_path / "clean", HEADER, rows(usual(400), bound=1.6))
    written(tmp_path / ("a-corrupted-record-" * 8), HEADER, bad_record())
    return tmp_path


def bad(runs: Path) -> str:
    return str(next(runs.glob("a-corrupted*")))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and "\r" not in out
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_suggest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "suggest", str(runs / "clean")).splitlines()
    assert lines[0] == "clean" and lines[1].startswith("Clip at 1.3")
    cells = [line.split() for line in lines]
    titles = ["bound", "norm", "clipped", "mean", "coef", "longest", "streak", "then", "it", "is"]
    start = cells.index(titles)
    assert [row[0] for row in cells[start + 2 : start + 9]] == ["p50", "p75", "p90", "p95", "p99", "max", "in"]
    assert "The bound in use, 1.6, is a safety net" in "\n".join(lines)
    assert lines[-2].startswith("  launch/train.py clip=global_norm clip.max_norm=1.3")
    assert lines[-1].startswith("  distclip.GradClipper(model, distclip.global_norm(1.3")
    assert "Mind: The log was made with batch 16, not 32" in said(
        capsys, "suggest", str(runs / "clean"), "--batch", "32"
    )


def test_suggest_where_norms_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, rows(usual(1500) * 4 ** (1 - usual(1500).cumsum() / 1600), bound=0.2))
    out = said(capsys, "suggest", str(tmp_path))
    words = " ".join(out.split())
    assert "is a normaliser" in words and "learning rate are then one knob" in words
    assert "Adaptive, with a cap that always holds:\n  launch/train.py clip=median_mad clip.cap=" in out


def test_diagnose(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "diagnose", str(runs))
    assert "clean: 400 steps" in out and "nothing stands out" in out
    assert "Spikes share sample 137  [bad data]" in out
    assert f"launch/train.py resume={bad(runs)} replay=" in out, "a command may not be folded"
    assert all(len(line) <= 120 or str(runs) in line or "a-corrupted" in line for line in out.splitlines())


def test_blame(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "blame", bad(runs)).splitlines()
    assert ["137", "57", "of", "57"] in [line.split()[:4] for line in lines]
    assert lines[-1].startswith(f"  launch/train.py resume={bad(runs)} replay=")
    assert "nobody to blame" in said(capsys, "blame", str(runs / "clean"))


def test_a_file_of_lines_is_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = (runs / "clean" / "metrics.jsonl").rename(runs / "mine.jsonl")
    assert said(capsys, "diagnose", str(path)).startswith("mine.jsonl: 400 steps")


def test_report(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the page, of which other tests know more."""

    def write_page(logs: Sequence[Log], path: Path, judged: object) -> None:
        path.write_text(" ".join(log.name for log in logs))

    def write_pictures(logs: Sequence[Log], directory: Path) -> list[Path]:
        return [directory / "norm.png"]

    for stand_in in (write_page, write_pictures):
        monkeypatch.setattr(dashboard, stand_in.__name__, stand_in, raising=False)
    monkeypatch.setattr(dashboard, "overview", lambda logs, console, judged: console.print(len(logs)), raising=False)
    monkeypatch.chdir(runs)
    assert said(capsys, "report", "clean") == "1\npage: clean/report.html\n"
    assert said(capsys, "report", ".") == "2\npage: report.html\n"
    assert said(capsys, "report", "clean", "--out", "x.html", "--png", "p").splitlines()[1:] == [
        "page: x.html",
        "picture: p/norm.png",
    ]
    assert (runs / "x.html").read_text() == "clean"
    assert "nowhere/x.html cannot be written: No such file or directory" in failed(
        capsys, "report", "clean", "--out", "nowhere/x.html"
    )


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


def test_what_is_no_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, foreign = runs / "empty.jsonl", runs / "foreign.jsonl"
    empty.write_text("")
    foreign.write_text('{"epoch": 1, "grad_norm": 2.0}\n')
    nan = str(written(runs / "nan", HEADER, rows([float("nan")] * 300)))
    short = str(written(runs / "short", HEADER, rows(usual(100))))
    for name in ("suggest", "diagnose", "blame", "report"):
        assert "nowhere does not exist" in refused(capsys, name, str(runs / "nowhere"))
        assert "is empty" in refused(capsys, name, str(empty))
        assert "only epoch, grad_norm" in refused(capsys, name, str(foreign))
    assert "not one of 300 norms is finite" in refused(capsys, "suggest", nan)
    assert "have 100 finite norms, and a bound needs 200" in refused(capsys, "suggest", short)
    assert f"4 runs are in {runs}, and it looks at one: write {bad(runs)}, say" in refused(capsys, "blame", str(runs))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["suggest"], "RUN"),
        (["plot", "x"], "plot"),
        (["suggest", "x", "--batch", "0"], "write 1 or more"),
    ],
)
def test_what_cannot_be(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_torn_lines_are_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "clean" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert main(["diagnose", str(runs / "clean")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("clean: 399 steps")
    assert err == f"distclip diagnose: {path}: line 401 cannot be read and was left out\n"


@pytest.mark.parametrize("missing", ["numpy", "rich", "plotly"])
def test_without_the_extra(
    missing: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == missing or (missing == "plotly" and name == "page"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=missing)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("distclip.monitor.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    error = refused(capsys, "report", str(runs / "clean"))
    assert error == f"distclip report needs {missing}: pip install 'distclip[report]'\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(asked: object) -> int:
        raise ModuleNotFoundError("No module named 'distclip.nothing'", name="distclip.nothing")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["diagnose", "x"])


def test_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(asked: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    assert main(["diagnose", "x"]) == 130


def test_of_its_own_process(runs: Path) -> None:
    """On a pipe that is closed before anything comes, as by `| head -0`, and with warnings as errors."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "distclip.monitor", "diagnose", str(runs)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"distclip {distclip.__version__}\n"


def test_a_narrow_terminal(runs: Path) -> None:
    """Sentences are folded there; a command is not."""
    output = StringIO()
    log = read(Path(bad(runs)))
    Terminal(Console(file=output, width=50, force_terminal=True, color_system=None)).blame(log, blame(log))
    lines = output.getvalue().splitlines()
    assert sum(len(line) > 50 for line in lines) == 2, "the name and the command"
    assert lines[-1].strip() == blame(log).replay
