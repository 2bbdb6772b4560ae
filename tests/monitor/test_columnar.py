"""A columnar log is read like a log of lines, shows every spike at every level, and survives a crash at any moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")

import distclip
from distclip.monitor import Recorder
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import Log, read
from distclip.monitor.cli import main
from distclip.monitor.columnar import lines as columnar_lines
from distclip.monitor.columnar import store as columnar_store
from distclip.monitor.columnar.files import WINDOW, read_cells, read_level, read_part, read_window
from distclip.monitor.columnar.lines import ColumnarLines
from distclip.monitor.columnar.part import make_part, merge, trim
from distclip.monitor.columnar.pyramid import coarsen, select_cells, summarize
from distclip.monitor.columnar.store import Store
from distclip.monitor.jsonl import COLUMNS, JsonLines
from tests.logs import HEADER, make_line

TENSORS = ["a.weight", "a.bias", "b.weight"]

Lines = list[dict[str, Any]]
Session = tuple[Lines, list[str]]


class Killed(BaseException):
    """The process ended here."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make parts of 32 steps, windows of 64, and merges of 3, so that short runs have all of them."""
    monkeypatch.setattr(columnar_lines, "ROWS", 32)
    monkeypatch.setattr(columnar_lines, "BUCKET", 8)
    monkeypatch.setattr(columnar_store, "WINDOW_ROWS", 64)
    monkeypatch.setattr(columnar_store, "NUM_MERGED", 3)


def make_session(first: int, steps: int, tensors: Sequence[str] = TENSORS, seed: int = 0) -> Session:
    """Return the lines of one recorder, with a spike, samples and a culprit."""
    generator = np.random.default_rng([seed, first])
    norms = np.exp(generator.normal(0, 0.3, (steps, len(tensors))))
    lines = []
    for i, row in enumerate(norms):
        line = make_line(first + i, float(np.linalg.norm(row)), tensor_norms=row, time=1e9 + i)
        if (first + i) % 50 == 7:
            line |= {"spike": 4.5, "ids": [first + i, 3], "worst": {"rank": 0, "tensor": tensors[0], "share": 0.9}}
        if (first + i) % 90 == 11:
            line |= {"norm": None, "finite": False, "skipped": True}
            line |= {"culprits": [{"name": tensors[0], "nans": 1, "infs": 0, "ranks": [0]}]}
        if i >= steps // 2:
            line["tokens"] = 100 * i
        lines.append(line)
    return lines, list(tensors)


def record(log: JsonLines, session: Session, every: int = 10) -> None:
    """Write lines as a recorder does."""
    lines, tensors = session
    log.append([{**HEADER, "tensors": tensors, "first": lines[0]["step"]}])
    for start in range(0, len(lines), every):
        rows = lines[start : start + every]
        log.append([{**row, "tensor_norms": log.convert_vector(row["tensor_norms"])} for row in rows])


def record_both(directory: Path, sessions: Sequence[Session], every: int = 10) -> tuple[Log, Log]:
    """Write the same sessions as lines and as columns, and read both."""
    logs = []
    for name, kind in (("jsonl", JsonLines), ("columnar", ColumnarLines)):
        for session in sessions:
            record(kind(directory / name / "metrics.jsonl"), session, every)
        logs.append(read(directory / name, "run"))
    return logs[0], logs[1]


def assert_equal(left: Log, right: Log) -> None:
    """Check that two logs have the same numbers, spikes and sessions."""
    for field in ("steps", "norms", "bounds", "coefs", "clipped", "finite", "skipped"):
        np.testing.assert_array_equal(vars(left)[field], vars(right)[field], err_msg=field)
    assert left.columns.keys() == right.columns.keys()
    for key, column in left.columns.items():
        np.testing.assert_array_equal(column, right.columns[key], err_msg=key)
    assert (left.spikes, left.culprits) == (right.spikes, right.culprits)
    assert [session.start for session in left.sessions] == [session.start for session in right.sessions]
    assert left.header == right.header


RESTARTS: dict[str, list[Session]] = {
    "one session": [make_session(1, 300)],
    "short": [make_session(1, 20)],
    "resumed": [make_session(1, 100), make_session(101, 100)],
    "resumed earlier": [make_session(1, 150), make_session(120, 60)],
    "resumed far earlier": [make_session(1, 300), make_session(20, 70)],
    "started again": [make_session(1, 150), make_session(1, 40)],
    "resumed several times": [make_session(1, 90), make_session(60, 70), make_session(100, 100), make_session(81, 9)],
    "other tensors": [make_session(1, 70), make_session(71, 70, ["b.weight", "c.weight"])],
}


@pytest.mark.parametrize("name", RESTARTS)
def test_columns_are_read_like_lines(name: str, tmp_path: Path) -> None:
    lines, columns = record_both(tmp_path, RESTARTS[name])
    assert_equal(lines, columns)
    assert set(lines.tensors) == set(columns.tensors)


@pytest.mark.parametrize("name", ["short", "resumed earlier"])
def test_short_runs_keep_all_norms_of_tensors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar_store, "WINDOW_ROWS", 1000)
    lines, columns = record_both(tmp_path, RESTARTS[name])
    np.testing.assert_array_equal(lines.tensor_steps, columns.tensor_steps)
    np.testing.assert_allclose(lines.tensor_norms, columns.tensor_norms, rtol=6e-6)
    np.testing.assert_array_equal(columns.tensor_norms, columns.tensor_peaks)


def test_a_log_of_lines_is_continued_as_columns(tmp_path: Path) -> None:
    first, second = RESTARTS["resumed"]
    lines, _ = record_both(tmp_path, [first, second])
    record(JsonLines(tmp_path / "mixed" / "metrics.jsonl"), first)
    record(ColumnarLines(tmp_path / "mixed" / "metrics.jsonl"), second)
    assert_equal(lines, read(tmp_path / "mixed"))


@settings(deadline=None, max_examples=25)
@given(
    num_steps=st.integers(1, 2500),
    spikes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 3)), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 2500), max_size=4),
)
def test_a_spike_is_visible_at_every_level(num_steps: int, spikes: list[tuple[float, int]], cuts: list[int]) -> None:
    """However the steps are divided into parts that are merged, each level has the spike in the row of its step."""
    steps = np.arange(1, num_steps + 1)
    norms = np.exp(np.random.default_rng(num_steps).normal(0, 0.3, (num_steps, 4))).astype(np.float32)
    where = {(int(position * num_steps), tensor) for position, tensor in spikes}
    for row, tensor in where:
        norms[row, tensor] = 1000
    edges = sorted({0, num_steps, *(cut for cut in cuts if cut < num_steps)})
    parts = []
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        flags = dict.fromkeys(("clipped", "finite", "skipped"), steps[a:b] > 0)
        numbers = {"norm": steps[a:b] * 1.0}
        parts.append(make_part(steps[a:b], numbers, flags, {}, [], tuple("abcd"), steps[a:b], norms[a:b]))
    part = merge(parts, 1)
    level = part.level
    while True:
        for row, tensor in where:
            found = int(np.searchsorted(level.last, row + 1))
            assert level.first[found] <= row + 1 <= level.last[found]
            assert level.high[found, tensor] == 1000
        if len(level) == 1:
            break
        level = coarsen(level)
    if num_steps >= 50:
        cells = set(zip(part.exact.steps.tolist(), part.exact.tensors.tolist(), strict=True))
        small_parts = min(b - a for a, b in zip(edges[:-1], edges[1:], strict=True)) < 20
        assert small_parts or {(row + 1, tensor) for row, tensor in where} <= cells


def test_norms_that_are_not_finite_hide_no_peak() -> None:
    norms = np.ones((20, 2), np.float32)
    norms[3], norms[5, 0], norms[:, 1] = np.nan, 9, np.nan
    level = summarize(np.arange(20), norms, bucket=10)
    np.testing.assert_array_equal(level.high, [[9, np.nan], [1, np.nan]])
    assert set(select_cells(np.arange(20), norms, []).tensors.tolist()) == {0}


def test_a_restart_within_the_window_recomputes_the_row_it_divides() -> None:
    steps, norms = np.arange(1, 301), np.ones((300, 1), np.float32)
    norms[[99, 289], 0] = 50, 70
    flags = dict.fromkeys(("clipped", "finite", "skipped"), steps > 0)
    part = make_part(steps, {"norm": steps * 1.0}, flags, {290: {"spike": 70.0}}, [], ("a",), steps, norms)
    cut = trim(part, 280)
    assert (cut.level.last.tolist(), cut.level.high.ravel().tolist()) == ([256, 279], [50, 1])
    assert not cut.details
    assert 290 not in cut.exact.steps


def crash_points(monkeypatch: pytest.MonkeyPatch, reach: int | None) -> Callable[[], int]:
    """Raise before the n-th operation that changes a directory or replaces a file. Return a count of them."""
    count = 0

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if reach is not None and count > reach:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (Path, "mkdir")):
        wrap(owner, name)
    wrap(columnar_store, "write_part")
    wrap(columnar_lines, "make_part_of_lines")
    return lambda: count


def test_every_step_is_read_once_after_a_crash_at_any_moment(tmp_path: Path) -> None:
    first, rest = make_session(1, 250), make_session(251, 40)
    with pytest.MonkeyPatch.context() as patch:
        num_operations = crash_points(patch, None)
        record(ColumnarLines(tmp_path / "whole" / "metrics.jsonl"), first)
        total = num_operations()
    assert total > 40
    for reach in range(2, total, 3):
        run = tmp_path / f"killed{reach}"
        log = ColumnarLines(run / "metrics.jsonl")
        with pytest.MonkeyPatch.context() as patch:
            crash_points(patch, reach - 2)
            with pytest.raises(Killed):
                record(log, first)
        seen = read(run)
        assert seen.steps.tolist() == list(range(1, len(seen.steps) + 1))
        # The file of lines has each step before it becomes a part.
        assert len(seen.steps) % 10 == 0
        record(ColumnarLines(run / "metrics.jsonl"), (rest[0], rest[1]))
        after = read(run)
        assert after.steps.tolist() == [*range(1, len(seen.steps) + 1), *range(251, 291)]
        assert not [path for path in (run / COLUMNS).iterdir() if path.name.startswith(".")]


def test_a_torn_line_is_the_only_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(ColumnarLines(path), make_session(1, 70))
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.warns(match="cannot be read"):
        assert len(read(tmp_path).steps) == 69
    record(ColumnarLines(path), make_session(70, 100))
    assert read(tmp_path).steps.tolist() == list(range(1, 170))


def test_old_parts_keep_outliers_and_no_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[Path] = []
    read_info = columnar_store.read_info
    monkeypatch.setattr(columnar_store, "read_info", lambda path: (described.append(path), read_info(path))[1])
    record(ColumnarLines(tmp_path / "metrics.jsonl"), make_session(1, 500))
    assert len(described) == len(set(described)) > 15, "the description of a part is read once"
    parts = Store(tmp_path / COLUMNS).parts()
    assert parts[0].info.generation >= 1
    assert [(part.path / WINDOW).exists() for part in parts] == [False] * (len(parts) - 2) + [True] * 2
    steps = {step for part in parts for step in read_cells(part.path).steps.tolist()}
    assert {step for step in range(1, parts[-1].info.last) if step % 50 == 7} <= steps
    whole = read_part(parts[0].path)
    assert len(read_level(parts[0].path, parts[0].info, 9)) == 1
    assert len(whole.steps) == parts[0].info.num_rows
    assert len(read_window(parts[0].path, parts[0].info)[0]) == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda part: _cut(part / "steps.parquet"), "steps.parquet is damaged"),
    "empty": (lambda part: (part / "level-0.parquet").write_bytes(b""), "level-0.parquet is damaged"),
    "foreign": (
        lambda part: (part / "steps.parquet").write_text("a,b\n1,2\n"),
        "is damaged, or not a file of this log",
    ),
    "other columns": (
        lambda part: shutil.copy(part / "exact.parquet", part / "level-0.parquet"),
        "level-0.parquet is ",
    ),
    "no part.json": (lambda part: (part / "part.json").unlink(), "part.json is missing"),
    "text as part.json": (lambda part: (part / "part.json").write_text("{}"), "part.json is not a file of this log"),
    "newer": (lambda part: (part / "part.json").write_text('{"format": 9}'), "has format 9"),
    "missing part": (shutil.rmtree, "Restore the missing parts"),
    "missing parts": (lambda part: shutil.rmtree(part.parent), "Restore metrics.columns"),
    "rows of another part": (
        lambda part: shutil.copy(sorted(part.parent.iterdir())[-1] / "steps.parquet", part / "steps.parquet"),
        "does not belong to this log",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_columns_give_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(ColumnarLines(tmp_path / "metrics.jsonl"), make_session(1, 200))
    damage, message = DAMAGE[name]
    first = sorted((tmp_path / COLUMNS).iterdir())[0]
    damage(first)
    assert main(["diagnose", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert message in err, err
    assert err.count("\n") == 1
    assert not out


def test_commands_read_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_both(tmp_path, [make_session(1, 400)])
    for command in ("suggest", "diagnose", "blame"):
        documents = []
        for name in ("jsonl", "columnar"):
            assert main([command, str(tmp_path / name), "--json"]) == 0
            run = json.loads(capsys.readouterr().out)["runs"][0]
            documents.append({key: value for key, value in run.items() if key not in ("name", "path")})
        assert documents[0] == documents[1]
    assert main(["report", str(tmp_path)]) == 0
    assert "a.weight" in (tmp_path / "report.html").read_text()


def test_columns_without_lines_are_a_run(tmp_path: Path) -> None:
    record(ColumnarLines(tmp_path / "run" / "metrics.jsonl"), make_session(1, 70))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert read(tmp_path / "run").steps[-1] == 40


def test_an_old_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(JsonLines(tmp_path / "metrics.jsonl"), make_session(1, 70))
    monkeypatch.setattr(columnar_lines, "MAX_SIZE", 1000)
    with pytest.raises(RunError, match="Record to another directory"):
        ColumnarLines(tmp_path / "metrics.jsonl")


def test_a_recorder_writes_columns(tmp_path: Path) -> None:
    weights = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("a", "b")}
    clipper = distclip.GradClipper(weights.items(), distclip.global_norm(1.0))
    with Recorder(clipper, tmp_path, log="columnar", per_tensor=True, every=5, facts={"batch": 4}) as recorder:
        for step in range(1, 51):
            weights["a"].grad, weights["b"].grad = torch.full((2,), 3.0), torch.full((2,), 4.0 * step)
            clipper.clip()
            recorder.note(loss=1 / step, lr=0.1, ids=[step])
    log = read(tmp_path)
    assert len(log.steps) == 50
    assert len(list((tmp_path / COLUMNS).iterdir())) == 1
    np.testing.assert_array_equal(log.columns["loss"], 1 / np.arange(1, 51))
    assert (log.header["batch"], log.tensors) == (4, ("a", "b"))
    assert log.tensor_peaks[-1, 1] == pytest.approx(200 * 2**0.5)
    with pytest.raises(distclip.ArgumentError, match='Use log="columnar", or another directory'):
        Recorder(clipper, tmp_path)
    with pytest.raises(distclip.ArgumentError, match='Use log="jsonl" or log="columnar"'):
        Recorder(clipper, tmp_path, log="parquet")  # type: ignore[arg-type]
