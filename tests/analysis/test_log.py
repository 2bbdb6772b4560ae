"""Lines become columns as the obvious slow reader makes them, whatever was torn, resumed or strange."""

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

from distclip.monitor.analysis import reading, steps, tensors
from distclip.monitor.analysis.errors import RunError, TornWarning
from distclip.monitor.analysis.log import Log, find_runs, read, read_all
from distclip.monitor.analysis.runs import names_of

HEADER = {"distclip": "0.5.0", "format": 1, "slots": ["model"], "tensors": ["a", "b"], "batch": 16}


def written(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def quiet(path: Path) -> Log:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TornWarning)
        return read(path)


def test_defaults_of_lines_by_hand(tmp_path: Path) -> None:
    rows = [{"step": 1, "norm": 2.0}, {"step": 3, "norm": 4.0, "coef": 0.5, "lr": 0.1}, {"step": 4, "norm": None}]
    log = read(written(tmp_path / "metrics.jsonl", *rows))
    assert log.steps.tolist() == [1, 3, 4]
    np.testing.assert_equal(log.norms, [2, 4, math.nan])
    np.testing.assert_equal(log.bounds, [math.nan] * 3)
    assert log.coefs.tolist() == [1, 0.5, 1]
    assert log.clipped.tolist() == [False, True, False]
    assert log.finite.tolist() == [True, True, False]
    assert log.skipped.tolist() == [False] * 3
    assert list(log.columns) == ["lr"]
    np.testing.assert_equal(log.columns["lr"], [math.nan, 0.1, math.nan])
    assert (log.header, log.sessions, log.spikes, log.culprits, log.tensors, log.torn) == ({}, (), (), (), (), 0)
    assert log.name == tmp_path.name and log.summary is None


def test_everything_a_recorder_writes(tmp_path: Path) -> None:
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
    written(tmp_path / "metrics.jsonl", *rows)
    written(tmp_path / "summary.json", {"held_out": 2.0})
    written(tmp_path / "figures" / "cliff.json", {})
    log = read(tmp_path)
    assert log.header == HEADER and [(each.start, each.header) for each in log.sessions] == [(1, HEADER)]
    assert log.tensors == ("a", "b") and log.tensor_steps.tolist() == [1, 2]
    np.testing.assert_equal(log.tensor_norms, [[0.6, 0.8], [math.nan, 0.5]])
    assert log.skipped.tolist() == [False, True, False] and log.coefs.tolist() == [1, 1, 1]
    assert sorted(log.columns) == ["loss", "nonfinite"]
    first, second = log.spikes
    assert (first.step, first.ids, first.rank, first.tensor) == (2, (17, "x"), 1, "a")
    assert math.isnan(first.norm) and math.isnan(first.ratio) and math.isnan(first.share)
    assert (second.ratio, second.ids, second.rank, second.tensor, second.share) == (9, (4,), None, "b", 0.9)
    assert [(each.step, each.name, each.nans, each.infs, each.ranks) for each in log.culprits] == [(2, "a", 2, 1, (1,))]
    assert log.summary == {"held_out": 2.0} and log.figures == (tmp_path / "figures" / "cliff.json",)


def test_a_resumed_run_forgets_what_comes_again(tmp_path: Path) -> None:
    def row(step: int, norm: float, **more: object) -> dict[str, object]:
        return {"step": step, "norm": norm, "tensor_norms": [norm, 0], "spike": norm, **more}

    culprit = {"culprits": [{"name": "a"}]}
    path = written(
        tmp_path / "metrics.jsonl",
        HEADER,
        *(row(step, 1.0, old=1.0, **(culprit if step == 5 else {})) for step in range(1, 7)),
        '{"step": 7, "no\n',
        {**HEADER, "batch": 32},
        *(row(step, 2.0) for step in range(4, 6)),
    )
    with pytest.warns(TornWarning, match="line 8 cannot be read and was left out"):
        log = read(path)
    assert log.steps.tolist() == [1, 2, 3, 4, 5] and log.norms.tolist() == [1, 1, 1, 2, 2]
    assert [each.ratio for each in log.spikes] == log.norms.tolist() == log.tensor_norms[:, 0].tolist()
    np.testing.assert_equal(log.columns["old"], [1, 1, 1, math.nan, math.nan])
    assert log.culprits == () and log.torn == 1
    assert [(each.start, each.header["batch"]) for each in log.sessions] == [(1, 16), (4, 32)]
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


def slowly(text: str) -> tuple[list[dict[str, Any]], int]:
    """One line after another."""
    kept: list[dict[str, Any]] = []
    torn = 0
    for line in text.split("\n"):
        if not (line := line.strip(" \x00")):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            torn += 1
        elif "distclip" not in row and "step" in row and "norm" in row:
            step = row["step"]
            if isinstance(step, bool) or not isinstance(step, (int, float)) or step % 1 or step > 1 << 63:
                torn += 1
            else:
                kept = [*(each for each in kept if each["step"] < step), row]
    return kept, torn


def value(row: dict[str, Any], key: str) -> float:
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < 1e300:
        return math.nan
    return found


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(PIECES, max_size=25), torn=st.integers(0, 40), block=st.sampled_from([1, 7, 64, 1 << 20]))
def test_reads_as_the_slow_reader(
    rows: list[Any], torn: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    text = text[: max(0, len(text) - torn)]
    path = written(tmp_path_factory.getbasetemp() / "any.jsonl", text)
    kept, unread = slowly(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        if not kept:
            with pytest.raises(RunError):
                quiet(path)
            return
        log = quiet(path)
    assert log.steps.tolist() == [row["step"] for row in kept] and log.torn == unread
    norms = [value(row, "norm") for row in kept]
    np.testing.assert_equal(log.norms, [math.nan if each < 0 else each for each in norms])
    for key, column in {"bound": log.bounds, **log.columns}.items():
        np.testing.assert_equal(column, [value(row, key) for row in kept])
    coefs = [value(row, "coef") for row in kept]
    np.testing.assert_equal(log.coefs, [each if 0 <= each <= 1 else 1.0 for each in coefs])
    for key, flags, otherwise in (
        ("clipped", log.clipped, log.coefs < 1),
        ("finite", log.finite, ~np.isnan(log.norms)),
        ("skipped", log.skipped, np.zeros(len(kept), bool)),
    ):
        told = [row.get(key) for row in kept]
        assert flags.tolist() == [bool(t) if t in (0, 1) else o for t, o in zip(told, otherwise.tolist(), strict=True)]


def test_torn_lines_do_not_make_up_a_whole_one(tmp_path: Path) -> None:
    torn = '{"step": 2, "norm": 3, "culprits": [{"name": "a"}\n{"name": "b"}]}\n'
    log = quiet(written(tmp_path / "m.jsonl", {"step": 1, "norm": 1}, torn, {"step": 3, "norm": 1}))
    assert log.steps.tolist() == [1, 3] and log.torn == 2


def test_a_long_run_keeps_a_bounded_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MOST", 20)
    monkeypatch.setattr(steps, "MOST", 10)
    rows = [
        {"step": step, "norm": 1.0, "spike": 2.0 + (step == 40), "tensor_norms": [step, 0], "culprits": [{"name": "a"}]}
        for step in range(1, 101)
    ]
    log = read(written(tmp_path / "metrics.jsonl", HEADER, *rows))
    assert log.tensor_steps.tolist() == list(range(1, 101, 8)) == log.tensor_norms[:, 0].tolist()
    assert len(log.spikes) <= 20 and any(spike.step == 40 for spike in log.spikes) and len(log.culprits) == 10


def test_tensors_that_change_at_a_resume(tmp_path: Path) -> None:
    rows = [HEADER, {"step": 1, "norm": 1, "tensor_norms": [1, 2]}, {"step": 2, "norm": 1, "tensor_norms": [1]}]
    other = {**HEADER, "tensors": ["b", "c"]}
    log = read(written(tmp_path / "m.jsonl", *rows, other, {"step": 3, "norm": 1, "tensor_norms": [3, 4]}))
    assert log.tensors == ("a", "b", "c") and log.tensor_steps.tolist() == [1, 3]
    np.testing.assert_equal(log.tensor_norms, [[1, 2, math.nan], [math.nan, 3, 4]])


def test_slots_are_tensors_where_there_is_nothing_finer(tmp_path: Path) -> None:
    header = {"distclip": "0", "slots": ["head", "rest"]}
    log = read(written(tmp_path / "m.jsonl", header, {"step": 1, "norm": 5, "norms": [3, 4]}))
    assert log.tensors == ("head", "rest") and log.tensor_norms.tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("\n \n", "no line that is a JSON object"),
        ("\x00\x01\x02\xff" * 100, "no line that is a JSON object"),
        ("step: 1\nnorm: 2\n", "no line that is a JSON object"),
        ('{"epoch": 1, "grad_norm": 2.0}\n' * 3, 'no line with a "step" and a "norm", only epoch, grad_norm'),
        ('{"step": 1, "loss": 2.0}\n', "only step, loss"),
        ('{"step": "one", "norm": 2.0}\n', 'no "step" in it is a whole number'),
        (json.dumps(HEADER | {"every": 50}) + "\n", "before any was written, which was to be every 50 steps"),
    ],
)
def test_what_is_no_log(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError) as caught:
        quiet(path)
    assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_lines_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST", 3 << 20)
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"x" * (6 << 20))
    with pytest.raises(RunError, match="3 MiB without a line's end"):
        quiet(path)


def test_runs_are_found_where_they_lie(tmp_path: Path) -> None:
    row = {"step": 1, "norm": 1.0}
    for run in ("a/x", "a/deep/er", "b", ".hidden/z", "a/much/too/deep/to/see"):
        written(tmp_path / run / "metrics.jsonl", row)
    alone = written(tmp_path / "alone.jsonl", row)
    found = find_runs([tmp_path])
    assert found == [tmp_path / "a/deep/er", tmp_path / "a/x", tmp_path / "b"]
    assert names_of(found) == ["a/deep/er", "a/x", "b"] == [log.name for log in read_all([tmp_path])]
    assert find_runs([tmp_path / "b", tmp_path, alone]) == [tmp_path / "b", *found[:2], alone]
    assert names_of([tmp_path / "b" / "metrics.jsonl", alone]) == ["b", "alone.jsonl"]
    assert names_of([tmp_path / "b"]) == ["b"]


def test_what_is_no_run(tmp_path: Path) -> None:
    written(tmp_path / "d" / "config.yaml", "x")
    (tmp_path / "d" / "sub").mkdir()
    (tmp_path / "e").mkdir()
    with pytest.raises(RunError, match="nowhere does not exist"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(RunError, match=r"has a metrics.jsonl \(it has config.yaml, sub/\)"):
        find_runs([tmp_path / "d"])
    with pytest.raises(RunError, match="it has nothing in it"):
        find_runs([tmp_path / "e"])
    with pytest.raises(RunError, match=r"m.jsonl cannot be read: No such file"):
        read(tmp_path / "m.jsonl")
