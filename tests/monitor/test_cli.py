"""The commands `distclip suggest`, `diagnose`, `blame` and `report`, as a user calls them."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import distclip
from distclip.errors import printable
from distclip.monitor import cli, dashboard
from distclip.monitor.analysis.blame import blame
from distclip.monitor.analysis.log import Log, read
from distclip.monitor.cli import main
from distclip.monitor.terminal import Terminal
from tests.commands import output
from tests.logs import HEADER, make_bad_data_lines, make_launched, make_lines, steady_norms, write_run

ROOT = Path(distclip.__file__).parents[1]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Write a directory of two runs, one of them with a long name."""
    make_launched(write_run(tmp_path / "clean", HEADER, make_lines(steady_norms(400), bound=1.6)))
    make_launched(write_run(tmp_path / ("a-corrupted-record-" * 8), HEADER, make_bad_data_lines()))
    return tmp_path


def bad_data_run(runs: Path) -> str:
    return str(next(runs.glob("a-corrupted*")))


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that succeeds. Return its output, which contains no control characters."""
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "\r" not in out
    return out


def run_failing_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails. Return its error, which is one line."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def test_suggest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_command(capsys, "suggest", str(runs / "clean")).splitlines()
    assert lines[0] == "clean"
    assert lines[1].startswith("Clip at 1.3")
    cells = [line.split() for line in lines]
    titles = ["bound", "norm", "clipped", "mean", "coef", "longest", "streak", "role"]
    start = cells.index(titles)
    assert [row[0] for row in cells[start + 2 : start + 9]] == ["p50", "p75", "p90", "p95", "p99", "max", "in"]
    assert "The bound in use, 1.6, is a safety net" in "\n".join(lines)
    assert lines[-2].startswith("  python launch/train.py clip=global_norm clip.max_norm=1.3")
    assert lines[-1].startswith("  distclip.GradClipper(model, distclip.global_norm(1.3")
    assert "Caution: The log was made with batch size 16, not 32" in run_command(
        capsys, "suggest", str(runs / "clean"), "--batch", "32"
    )


def test_suggest_for_drifting_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = steady_norms(1500)
    write_run(tmp_path, make_lines(norms * 4 ** (1 - norms.cumsum() / 1600), bound=0.2))
    out = run_command(capsys, "suggest", str(tmp_path))
    text = " ".join(out.split())
    assert "is a normaliser" in text
    assert "learning rate then have the same effect" in text
    assert "Use an adaptive policy, with a cap that always applies:\n  distclip.GradClipper(model" in out
    assert "distclip.median_mad(3, cap=" in out


def test_diagnose(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_command(capsys, "diagnose", str(runs))
    assert "clean: 400 steps" in out
    assert "no findings" in out
    assert "Spikes share sample 137  [bad data]" in out
    assert f"launch/train.py resume={bad_data_run(runs)} replay=" in out, "a command must not be wrapped"
    assert all(len(line) <= 120 or str(runs) in line or "a-corrupted" in line for line in out.splitlines())


def test_blame(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_command(capsys, "blame", bad_data_run(runs)).splitlines()
    assert ["137", "57", "of", "57"] in [line.split()[:4] for line in lines]
    assert lines[-1].startswith(f"  python launch/train.py resume={bad_data_run(runs)} replay=")
    assert "No spikes" in run_command(capsys, "blame", str(runs / "clean"))


def test_file_of_lines_is_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = (runs / "clean" / "metrics.jsonl").rename(runs / "mine.jsonl")
    assert run_command(capsys, "diagnose", str(path)).startswith("mine.jsonl: 400 steps")


def test_report(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command passes logs and paths on. Other tests check the page itself."""

    def write_page(logs: Sequence[Log], path: Path, assessments: object) -> None:
        path.write_text(" ".join(log.name for log in logs))

    def write_pngs(logs: Sequence[Log], directory: Path) -> list[Path]:
        return [directory / "norm.png"]

    for fake in (write_page, write_pngs):
        monkeypatch.setattr(dashboard, fake.__name__, fake)
    monkeypatch.setattr(dashboard, "print_summary", lambda logs, console, assessments: console.print(len(logs)))
    monkeypatch.chdir(runs)
    assert run_command(capsys, "report", "clean") == "1\npage: clean/report.html\n"
    assert run_command(capsys, "report", ".") == "2\npage: report.html\n"
    assert run_command(capsys, "report", "clean", "--out", "x.html", "--png", "p").splitlines()[1:] == [
        "page: x.html",
        "png: p/norm.png",
    ]
    assert (runs / "x.html").read_text() == "clean"
    assert main(("report", "clean", "--out", "nowhere/x.html")) == 1
    assert "nowhere/x.html cannot be written: No such file or directory" in capsys.readouterr().err


def test_invalid_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, foreign = runs / "empty.jsonl", runs / "foreign.jsonl"
    empty.write_text("")
    foreign.write_text('{"epoch": 1, "grad_norm": 2.0}\n')
    nan = str(write_run(runs / "nan", HEADER, make_lines([float("nan")] * 300)))
    short = str(write_run(runs / "short", HEADER, make_lines(steady_norms(100))))
    for name in ("suggest", "diagnose", "blame", "report"):
        assert "nowhere does not exist" in run_failing_command(capsys, name, str(runs / "nowhere"))
        assert "is empty" in run_failing_command(capsys, name, str(empty))
        assert "only epoch, grad_norm" in run_failing_command(capsys, name, str(foreign))
    assert "none of 300 norms is finite" in run_failing_command(capsys, "suggest", nan)
    assert "have 100 finite norms, and a bound needs 200" in run_failing_command(capsys, "suggest", short)
    assert f"{runs} contains 4 runs, but this command takes one. Pass {bad_data_run(runs)}" in run_failing_command(
        capsys, "blame", str(runs)
    )


@pytest.mark.parametrize(
    ("arguments", "excerpt"),
    [
        (["suggest"], "RUN"),
        (["plot", "x"], "'plot' (choose from"),
        (["sugest", "x"], ". Did you mean suggest?"),
        (["export", "x", "--to", "cvs"], ". Did you mean csv?"),
        (["report", "x", "--jsn"], "distclip report: error: unrecognized arguments: --jsn. Did you mean --json?"),
        (["--vershun"], "distclip: error: unrecognized arguments: --vershun. Did you mean --version?"),
        (["suggest", "x", "--batch", "0"], "Pass 1 or more"),
    ],
)
def test_invalid_arguments(arguments: list[str], excerpt: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert excerpt in capsys.readouterr().err


def test_unreadable_lines_are_one_warning(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "clean" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert main(["diagnose", str(runs / "clean")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("clean: 399 steps")
    assert err == f"distclip diagnose: {path}: line 401 cannot be read and was ignored\n"


@pytest.mark.parametrize("missing", ["numpy", "rich", "plotly"])
def test_missing_package(
    missing: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=missing)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("distclip.monitor.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    error = run_failing_command(capsys, "report", str(runs / "clean"))
    assert error == f"distclip report: {missing} is not installed. Use pip install 'distclip[report]'\n"


def test_other_import_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ModuleNotFoundError("No module named 'distclip.nothing'", name="distclip.nothing")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(ModuleNotFoundError):
        main(["diagnose", "x"])


def test_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(["diagnose", "x"]) == 130


def test_closed_pipe(runs: Path) -> None:
    """A reader such as `| head -0` closes the pipe before the first line. Warnings are errors here."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "distclip.monitor", "diagnose", str(runs)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 1


def test_runs_as_a_module() -> None:
    """`python -m distclip` is the command, for an environment whose scripts are not on the PATH."""
    assert output(sys.executable, "-m", "distclip", "--version") == f"distclip {distclip.__version__}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"distclip {distclip.__version__}\n"


def test_narrow_terminal(runs: Path) -> None:
    """Sentences are wrapped, and a command is not."""
    output = StringIO()
    log = read(Path(bad_data_run(runs)))
    Terminal(Console(file=output, width=50, force_terminal=True, color_system=None)).blame(log, blame(log))
    lines = output.getvalue().splitlines()
    assert sum(len(line) > 50 for line in lines) == 2, "the name and the command"
    assert lines[-1].strip() == blame(log).replay


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command with `--json`. Return the object that it prints, with all fields that docs/commands.md lists."""
    out = run_command(capsys, *arguments, "--json")
    assert out.count("\n") == 1
    content = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert (content["schema"], content["command"], content["distclip"]) == (1, arguments[0], distclip.__version__)
    text = (ROOT / "docs/commands.md").read_text()
    for fields in [content, *content["runs"]]:
        assert all(f"`{field}`" in text for field in fields)
    return content


def test_json(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = document(capsys, "suggest", str(runs / "clean"))["runs"]
    assert run["path"] == str(runs / "clean" / "metrics.jsonl")
    assert 1.3 <= run["max_norm"] < 1.4
    assert run["python"] == f"distclip.GradClipper(model, distclip.global_norm({run['max_norm']}))"
    assert [candidate["name"] for candidate in run["candidates"]] == ["p50", "p75", "p90", "p95", "p99", "max"]
    bad, clean = document(capsys, "diagnose", str(runs))["runs"]
    assert clean["findings"] == []
    assert [finding["rule"] for finding in bad["findings"]] == ["bad data"]
    assert clean["outcome"]["verdict"] == "healthy"
    (run,) = document(capsys, "blame", bad_data_run(runs))["runs"]
    assert run["suspects"][0]["id"] == 137
    assert run["worst"]["tensor"] == "2.weight"
    monkeypatch.setattr(dashboard, "write_page", lambda logs, path, assessments: None)
    content = document(capsys, "report", str(runs), "--out", "page.html")
    assert content["page"] == "page.html"
    assert content["pngs"] == []
    assert content["runs"][1]["suggestion"].startswith("Clip at 1.3")
    assert "none of 300 norms" in run_failing_command(
        capsys, "suggest", str(write_run(runs / "nan", HEADER, make_lines([float("nan")] * 300))), "--json"
    )


def test_check(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rising = make_lines(steady_norms(400), lambda step: {"loss": 2.0 + step})
    diverged = str(write_run(runs / "diverged", HEADER, rising))
    for command in ("diagnose", "blame"):
        assert main((command, str(runs / "clean"), "--check")) == 0
        assert main((command, bad_data_run(runs), "--check")) == 4
        assert main((command, diverged, "--check")) == 3
        assert main((command, diverged)) == 0
    assert main(("diagnose", bad_data_run(runs), diverged, "--check")) == 3
    assert main(("suggest", str(runs / "clean"), "--check")) == 0
    assert main(("suggest", diverged, "--check")) == 3, "there is no bound"
    assert main(("suggest", diverged)) == 1
    assert main(("suggest", str(runs / "nowhere"), "--check")) == 1
    capsys.readouterr()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "examples:\n  distclip report" in capsys.readouterr().out
    for command in ("report", "suggest", "diagnose", "blame"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"examples:\n  distclip {command} " in capsys.readouterr().out


def test_open(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(dashboard, "write_page", lambda logs, path, assessments: None)
    monkeypatch.setattr(cli.webbrowser, "open", opened.append)
    run_command(capsys, "report", str(runs / "clean"), "--open")
    assert opened == [(runs / "clean" / "report.html").as_uri()]


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        assert "diagnose" in run_command(capsys, "--print-completion", shell)


@pytest.mark.slow
def test_commands_do_not_import_torch(runs: Path) -> None:
    code = (
        "import sys\nfrom distclip.monitor.cli import main\nmain(['diagnose', sys.argv[1]])\nimport distclip.monitor\n"
        "assert 'torch' not in sys.modules\ndistclip.GradClipper, distclip.monitor.Recorder, distclip.recipes.olmo3\n"
        "assert 'zclip' in dir(distclip)\nmain(['--version'])"
    )
    out = output(sys.executable, "-W", "error", "-c", code, str(runs / "clean"), cwd=ROOT)
    assert out.splitlines()[-1] == f"distclip {distclip.__version__}"


NAMES = {
    "closing tag": "[/INST]",
    "markup": "shard[a-z]3 [bold]x[/bold]",
    "broken markup": "[link=file:///[/] [[ \\[",
    "emoji code": "a:smile:b",
    "link": "\x1b]8;;http://x\x07click\x1b]8;;\x07",
    "escape sequence": "\x1b[2J\x1b[31mred",
    "8-bit escape sequence": "\x9b31mred",
    "carriage return": "good\rbad\b\x07",
    "lines": "one\ntwo\u2028three\x85",
    "direction": "\u202eabc\u2066",
    "surrogate": "x\ud800y",
    "mathematics": "$\\frac{1$",
    "format": "{0} %s %(x)d",
    "page": "</script><img src=x onerror=alert(1)>",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_in_a_log_are_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(dashboard, "write_page", lambda logs, path, assessments: None)
    lines = make_bad_data_lines(epochs=8, samples=160, bad=17)
    for line in lines:
        if "ids" in line:
            line["ids"] = [name if sample == 17 else f"{name}{sample}" for sample in line["ids"]]
        if "worst" in line:
            line["worst"]["tensor"] = name
        line[name] = line["norm"]
        line["tensor_norms"] = [1e-3, line["norm"], 1e-3]
    lines[-1] |= {"finite": False, "norm": float("nan"), "culprits": [{"name": name, "nans": 1, "infs": 0}]}
    header = {**HEADER, "policy": name, "precision": name, name: name, "tensors": ["a", name, "b"]}
    folder = "".join(c for c in name if c not in "/\ud800")
    runs = [write_run(tmp_path / folder, header, lines), write_run(tmp_path / "other", header, lines)]
    (runs[0] / "summary.json").write_text(f'{{"held_out": {name!a}}}' if "\\" not in ascii(name) else "{}")
    foreign = runs[1] / "foreign.jsonl"
    foreign.write_text(json.dumps({name: 1}) + "\n")
    shown = " ".join(printable(name).split())
    for command in ("suggest", "blame", "diagnose", "report"):
        for run in (str(runs[0]), str(foreign)):
            main((command, run))
            out, err = capsys.readouterr()
            assert all(c.isprintable() or c == "\n" for c in out + err)
        if command == "blame":
            assert shown in " ".join(run_command(capsys, command, str(runs[1])).split())
    main(("report", *map(str, runs)))
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
