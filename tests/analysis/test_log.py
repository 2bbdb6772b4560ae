"""Logs: columns equal those of a simple, slow reader, for truncated, resumed and invalid files too."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distclip
from distclip.monitor.analysis.errors import RunError, UnreadableLinesWarning
from distclip.monitor.analysis.log import Log, columns, find_runs, name_runs, read, read_all, reader
from distclip.monitor.analysis.spikes import Culprit

HEADER = {"distclip": "0.5.0", "format": 1, "slots": ["model"], "tensors": ["a", "b"], "batch": 16}


def write_lines(path: Path, *rows: object) -> Path:
    """Write rows as JSON lines, and strings as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read_without_warnings(path: Path) -> Log:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableLinesWarning)
        return read(path)


def test_defaults_of_missing_fields(tmp_path: Path) -> None:
    rows = [{"step": 1, "norm": 2.0}, {"step": 3, "norm": 4.0, "coef": 0.5, "lr": 0.1}, {"step": 4, "norm": None}]
    log = read(write_lines(tmp_path / "metrics.jsonl", *rows))
    assert log.steps.tolist() == [1, 3, 4]
    np.testing.assert_equal(log.norms, [2, 4, math.nan])
    np.testing.assert_equal(log.bounds, [math.nan] * 3)
    assert log.coefs.tolist() == [1, 0.5, 1]
    assert log.clipped.tolist() == [False, True, False]
    assert log.finite.tolist() == [True, True, False]
    assert log.skipped.tolist() == [False] * 3
    assert list(log.columns) == ["lr"]
    np.testing.assert_equal(log.columns["lr"], [math.nan, 0.1, math.nan])
    assert (log.header, log.sessions, log.spikes, log.culprits, log.tensors, log.unreadable) == ({}, (), (), (), (), 0)
    assert log.name == tmp_path.name
    assert log.summary is None


def test_all_fields_of_a_recorder(tmp_path: Path) -> None:
    rows = [
        HEADER,
        {"step": 1, "norm": 1.0, "bound": 2.0, "tensor_norms": [0.6, 0.8], "loss": 3, "finite": True},
        {
            "step": 2,
            "norm": None,
            "coef": None,
            "clipped": False,
            "finite": False,
            "skipped": True,
            "nonfinite": 3,
            "tensor_norms": [None, 0.5],
            "culprits": [{"name": "a", "nans": 2, "infs": 1, "ranks": [1]}],
            "spike": None,
            "ids": [17, "x"],
            "worst": {"rank": 1, "tensor": "a", "share": None},
        },
        {"step": 3, "norm": 9.0, "spike": 9.0, "ids": [4], "worst": {"rank": None, "tensor": "b", "share": 0.9}},
    ]
    write_lines(tmp_path / "metrics.jsonl", *rows)
    write_lines(tmp_path / "summary.json", {"held_out": 2.0})
    write_lines(tmp_path / "figures" / "cliff.json", {})
    log = read(tmp_path)
    assert log.header == HEADER
    assert [(session.start, session.header) for session in log.sessions] == [(1, HEADER)]
    assert log.tensors == ("a", "b")
    assert log.tensor_steps.tolist() == [1, 2]
    np.testing.assert_equal(log.tensor_norms, [[0.6, 0.8], [math.nan, 0.5]])
    assert log.skipped.tolist() == [False, True, False]
    assert log.coefs.tolist() == [1, 1, 1]
    assert sorted(log.columns) == ["loss", "nonfinite"]
    first, second = log.spikes
    assert (first.step, first.ids, first.rank, first.tensor) == (2, (17, "x"), 1, "a")
    assert math.isnan(first.norm)
    assert math.isnan(first.ratio)
    assert math.isnan(first.share)
    assert (second.ratio, second.ids, second.rank, second.tensor, second.share) == (9, (4,), None, "b", 0.9)
    assert log.culprits == (Culprit(2, "a", 2, 1, (1,)),)
    assert log.summary == {"held_out": 2.0}
    assert log.figures == (tmp_path / "figures" / "cliff.json",)


def test_resumed_run_replaces_repeated_steps(tmp_path: Path) -> None:
    def row(step: int, norm: float, **more: object) -> dict[str, object]:
        return {"step": step, "norm": norm, "tensor_norms": [norm, 0], "spike": norm, **more}

    culprit = {"culprits": [{"name": "a"}]}
    path = write_lines(
        tmp_path / "metrics.jsonl",
        HEADER,
        *(row(step, 1.0, old=1.0, **(culprit if step == 5 else {})) for step in range(1, 7)),
        '{"step": 7, "no\n',
        {**HEADER, "batch": 32},
        *(row(step, 2.0) for step in range(4, 6)),
    )
    with pytest.warns(UnreadableLinesWarning, match="line 8 cannot be read and was ignored"):
        log = read(path)
    assert log.steps.tolist() == [1, 2, 3, 4, 5]
    assert log.norms.tolist() == [1, 1, 1, 2, 2]
    assert [spike.ratio for spike in log.spikes] == log.norms.tolist() == log.tensor_norms[:, 0].tolist()
    np.testing.assert_equal(log.columns["old"], [1, 1, 1, math.nan, math.nan])
    assert log.culprits == ()
    assert log.unreadable == 1
    assert [(session.start, session.header["batch"]) for session in log.sessions] == [(1, 16), (4, 32)]
    assert log.header["batch"] == 32


PIECES = st.one_of(
    st.builds(
        lambda step, norm, more: {"step": step, "norm": norm, **more},
        st.integers(0, 30) | st.sampled_from([3.0, 2.5, "4", None, True, 1 << 70]),
        st.floats(0, 100) | st.sampled_from([None, -1.0, math.nan, math.inf, "no", True, 10**400]),
        st.dictionaries(
            st.sampled_from(["coef", "bound", "loss", "clipped", "finite", "skipped", "note", "lr"]),
            st.floats(0, 2) | st.booleans() | st.none() | st.just("word") | st.just(10**400),
            max_size=4,
        ),
    ),
    st.just(HEADER),
    st.sampled_from([{"eval": 1}, [1], 3, {"step": 5}]),
    st.sampled_from(["", "  ", "\x00\x00", "{", '{"a": {"b": 1}', '"b": 2}', "junk"]),
)


def read_slowly(text: str) -> tuple[list[dict[str, Any]], int]:
    """Read line by line. Return the lines of steps, and the number of unreadable lines."""
    kept: list[dict[str, Any]] = []
    unreadable = 0
    for line in text.split("\n"):
        if not (line := line.strip(" \x00")):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            unreadable += 1
        elif "distclip" not in row and "step" in row and "norm" in row:
            step = row["step"]
            if isinstance(step, bool) or not isinstance(step, (int, float)) or step % 1 or step > 1 << 63:
                unreadable += 1
            else:
                kept = [*(earlier for earlier in kept if earlier["step"] < step), row]
    return kept, unreadable


def value(row: dict[str, Any], key: str) -> float:
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < 1e300:
        return math.nan
    return found


@settings(max_examples=150)
@given(rows=st.lists(PIECES, max_size=25), num_cut=st.integers(0, 40), block=st.sampled_from([1, 7, 64, 1 << 20]))
def test_reads_like_the_slow_reader(
    rows: list[Any], num_cut: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    text = text[: max(0, len(text) - num_cut)]
    path = write_lines(tmp_path_factory.getbasetemp() / "any.jsonl", text)
    kept, unreadable = read_slowly(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BLOCK_SIZE", block)
        if not kept:
            with pytest.raises(RunError):
                read_without_warnings(path)
            return
        log = read_without_warnings(path)
    assert log.steps.tolist() == [row["step"] for row in kept]
    assert log.unreadable == unreadable
    norms = [value(row, "norm") for row in kept]
    np.testing.assert_equal(log.norms, [math.nan if norm < 0 else norm for norm in norms])
    for key, column in {"bound": log.bounds, **log.columns}.items():
        np.testing.assert_equal(column, [value(row, key) for row in kept])
    coefs = [value(row, "coef") for row in kept]
    np.testing.assert_equal(log.coefs, [coef if 0 <= coef < math.inf else 1.0 for coef in coefs])
    for key, flags, defaults in (
        ("clipped", log.clipped, log.coefs != 1),
        ("finite", log.finite, ~np.isnan(log.norms)),
        ("skipped", log.skipped, np.zeros(len(kept), bool)),
    ):
        pairs = zip([row.get(key) for row in kept], defaults.tolist(), strict=True)
        assert flags.tolist() == [bool(value) if value in (0, 1) else default for value, default in pairs]


def test_truncated_lines_do_not_combine_to_a_valid_one(tmp_path: Path) -> None:
    truncated = '{"step": 2, "norm": 3, "culprits": [{"name": "a"}\n{"name": "b"}]}\n'
    log = read_without_warnings(
        write_lines(tmp_path / "m.jsonl", {"step": 1, "norm": 1}, truncated, {"step": 3, "norm": 1})
    )
    assert log.steps.tolist() == [1, 3]
    assert log.unreadable == 2


def test_memory_of_a_long_run_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_ROWS", 20)
    monkeypatch.setattr(reader, "MAX_DETAILS", 10)
    rows = [
        {"step": step, "norm": 1.0, "spike": 2.0 + (step == 40), "tensor_norms": [step, 0], "culprits": [{"name": "a"}]}
        for step in range(1, 101)
    ]
    log = read(write_lines(tmp_path / "metrics.jsonl", HEADER, *rows))
    assert log.tensor_steps.tolist() == list(range(1, 101, 8)) == log.tensor_norms[:, 0].tolist()
    assert len(log.spikes) <= 20
    assert any(spike.step == 40 for spike in log.spikes)
    assert len(log.culprits) == 10


def test_tensors_that_change_between_sessions(tmp_path: Path) -> None:
    rows = [HEADER, {"step": 1, "norm": 1, "tensor_norms": [1, 2]}, {"step": 2, "norm": 1, "tensor_norms": [1]}]
    other = {**HEADER, "tensors": ["b", "c"]}
    log = read(write_lines(tmp_path / "m.jsonl", *rows, other, {"step": 3, "norm": 1, "tensor_norms": [3, 4]}))
    assert log.tensors == ("a", "b", "c")
    assert log.tensor_steps.tolist() == [1, 3]
    np.testing.assert_equal(log.tensor_norms, [[1, 2, math.nan], [math.nan, 3, 4]])


def test_norms_of_slots_without_tensor_norms(tmp_path: Path) -> None:
    header = {"distclip": "0", "slots": ["head", "rest"]}
    log = read(write_lines(tmp_path / "m.jsonl", header, {"step": 1, "norm": 5, "norms": [3, 4]}))
    assert log.tensors == ("head", "rest")
    assert log.tensor_norms.tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("content", "excerpt"),
    [
        ("", "is empty"),
        ("\n \n", "no line that is a JSON object"),
        ("\x00\x01\x02\xff" * 100, "no line that is a JSON object"),
        ("step: 1\nnorm: 2\n", "no line that is a JSON object"),
        ('{"epoch": 1, "grad_norm": 2.0}\n' * 3, 'no line with a "step" and a "norm", only epoch, grad_norm'),
        ('{"step": 1, "loss": 2.0}\n', "only step, loss"),
        ('{"step": "one", "norm": 2.0}\n', 'no "step" in it is an integer'),
        (json.dumps(HEADER | {"every": 50}) + "\n", "before the first write (the recorder writes every 50 steps)"),
    ],
)
def test_invalid_file(content: str, excerpt: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError) as caught:
        read_without_warnings(path)
    assert str(path) in str(caught.value)
    assert excerpt in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_without_line_breaks_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_SIZE", 3 << 20)
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"x" * (6 << 20))
    with pytest.raises(RunError, match="3 MiB without a line break"):
        read_without_warnings(path)


def test_find_and_name_runs(tmp_path: Path) -> None:
    row = {"step": 1, "norm": 1.0}
    for run in ("a/x", "a/deep/er", "b", ".hidden/z", "a/much/too/deep/to/see"):
        write_lines(tmp_path / run / "metrics.jsonl", row)
    alone = write_lines(tmp_path / "alone.jsonl", row)
    found = find_runs([tmp_path])
    assert found == [tmp_path / "a/deep/er", tmp_path / "a/x", tmp_path / "b"]
    assert name_runs(found) == ["a/deep/er", "a/x", "b"] == [log.name for log in read_all([tmp_path])]
    assert find_runs([tmp_path / "b", tmp_path, alone]) == [tmp_path / "b", *found[:2], alone]
    assert find_runs(tmp_path) == find_runs(str(tmp_path)) == find_runs([str(tmp_path)]) == found
    assert name_runs([tmp_path / "b" / "metrics.jsonl", alone]) == ["b", "alone.jsonl"]
    assert name_runs([tmp_path / "b"]) == ["b"]


UUIDS = ["48cbc915-507b-42ab-8639-90f32013c56a", "90f32013-507b-42ab-8639-48cbc91556aa"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (
            ["01-04_48cbc915-507b-42ab-8639-90f32013c56a/a", "01-05_90f32013-507b-42ab-8639-48cbc91556aa/a"],
            ["01-04", "01-05"],
        ),
        (["x/seed_0/run", "x/seed_1/run"], ["seed_0", "seed_1"]),
        (["x/a/run", "x/a/other", "x/b/run"], ["a/run", "a/other", "b/run"]),
        (UUIDS, None),
        ([f"v_{uuid}" for uuid in UUIDS], None),
    ],
)
def test_short_names(tmp_path: Path, paths: list[str], names: list[str] | None) -> None:
    assert name_runs([tmp_path / path for path in paths]) == (names or paths)


def test_find_runs_without_a_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "config.yaml", "x")
    (tmp_path / "d" / "sub").mkdir()
    (tmp_path / "e").mkdir()
    with pytest.raises(RunError, match="nowhere does not exist"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(RunError, match=r"has a metrics.jsonl, .* \(it contains config.yaml, sub/\)"):
        find_runs([tmp_path / "d"])
    with pytest.raises(RunError, match="it contains nothing"):
        find_runs([tmp_path / "e"])
    with pytest.raises(RunError, match=r"m.jsonl cannot be read: No such file"):
        read(tmp_path / "m.jsonl")


@pytest.mark.parametrize("ranks", [(), (1,), (0, 3)])
def test_culprit_reads_like_that_of_the_clipper(ranks: tuple[int, ...]) -> None:
    for nans, infs in ((2, 0), (0, 1), (2, 1)):
        assert str(Culprit(7, "0.weight", nans, infs, ranks)) == str(distclip.Culprit("0.weight", nans, infs, ranks))
