"""Logs of other tools give the same norms and losses as those of a recorder, and name what they lack."""

from __future__ import annotations

import csv
import json
import sqlite3
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.diagnosis import find_outcome
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import Keys, find_runs, read
from distclip.monitor.analysis.suggest import suggest
from distclip.monitor.cli import main
from tests.logs import make_lines, steady_norms, write_run

NORMS = steady_norms(300)
LOSSES = 2 + np.exp(-np.arange(300) / 50)
STEPS = range(10, 3010, 10)


def rows(**names: str) -> list[dict[str, Any]]:
    """Return the rows of a log, with these names for step, norm and loss."""
    columns = {"step": STEPS, "norm": NORMS.tolist(), "loss": LOSSES.tolist()}
    return [
        {names[key]: value for key, value in zip(columns, values, strict=True)}
        for values in zip(*columns.values(), strict=True)
    ]


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_transformers(root: Path) -> Path:
    """Write two checkpoints, of which the second has the whole log, with an evaluation at each tenth step."""
    log = [row | {"learning_rate": 1e-3, "epoch": 0.1} for row in rows(step="step", norm="grad_norm", loss="loss")]
    log = [
        line for row in log for line in ([row, {"step": row["step"], "eval_loss": 9.0}] if row["step"] % 100 else [row])
    ]
    write_json(root / "out/checkpoint-900/trainer_state.json", {"log_history": log[:90]})
    write_json(
        root / "out/checkpoint-3000/trainer_state.json", {"log_history": [*log, {"train_loss": 5.0, "step": 3000}]}
    )
    return root / "out"


def write_lightning(root: Path) -> Path:
    """Write the norm and the loss of a step in separate rows, and a row of validation."""
    lines: list[dict[str, Any]] = []
    for row in rows(step="step", norm="grad_2.0_norm_total", loss="train_loss"):
        lines.append({"step": row["step"], "epoch": 0, "train_loss": row["train_loss"]})
        lines.append({"step": row["step"], "epoch": 0, "grad_2.0_norm_total": row["grad_2.0_norm_total"]})
    return write_csv(root / "logs/version_0/metrics.csv", [*lines, {"step": 3000, "val_loss": 9.0}]).parent


def write_wandb(root: Path) -> Path:
    """Write the CSV file of a chart, which has the extremes of each column."""
    lines = rows(step="Step", norm="brisk-run-7 - train/grad_norm", loss="brisk-run-7 - train/loss")
    for line in lines:
        line["brisk-run-7 - train/grad_norm__MIN"] = 0.0
        line["brisk-run-7 - train/grad_norm__MAX"] = 99.0
    return write_csv(root / "wandb_export.csv", lines)


def encode_field(number: int, value: bytes) -> bytes:
    """Encode a field of protocol buffers with fewer than 2,097,152 bytes."""
    sizes = [len(value) & 0x7F | 0x80, len(value) >> 7 & 0x7F | 0x80, len(value) >> 14]
    tag = number << 3 | 2
    return bytes([tag & 0x7F | 0x80, tag >> 7, *sizes]) + value


def write_wandb_record(root: Path) -> Path:
    """Write W&B's own file as in offline mode. Every tenth row has a text that is longer than a block."""
    content = b":W&B\xe1\xbe\x00"

    def add(kind: int, data: bytes) -> None:
        nonlocal content
        content += struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data

    add(1, b"\x80\x01\x05" + encode_field(17, b"a header, and a field of 8 and one of 4 bytes") + b"\x09" + bytes(8))
    for i, row in enumerate(rows(step="_step", norm="train/grad_norm", loss="train/loss")):
        numbers = row | {"note": "x" * 70_000 if i % 10 == 0 else "x"}
        history = b""
        for name, value in numbers.items():
            parts = b"".join(encode_field(2, part.encode()) for part in name.split("/"))
            history += encode_field(1, parts + encode_field(16, json.dumps(value).encode()))
        record = encode_field(2, history)
        first = True
        while first or record:
            left = (1 << 15) - len(content) % (1 << 15)
            if left < 7:
                content += bytes(left)
                continue
            part, record = record[: left - 7], record[left - 7 :]
            add((1 if first else 4) if not record else 2 if first else 3, part)
            first = False
    path = root / "job/wandb/offline-run-20260101_000000-1/run-1.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return root / "job"


def write_events(root: Path) -> Path:
    """Write event files of TensorBoard."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(root / "tb")) as writer:
        for row in rows(step="step", norm="optim/grad_norm", loss="train/loss"):
            for tag in ("optim/grad_norm", "train/loss"):
                writer.add_scalar(tag, row[tag], row["step"])
    return root / "tb"


def write_jsonl(root: Path) -> Path:
    path = root / "history.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows(step="_step", norm="train/grad_norm", loss="train/loss")))
    return path


def write_trackio(root: Path, run: str = "calm-sea-0", columns: str = "run_id TEXT NOT NULL,") -> Path:
    """Write a run into a database with the schema of Trackio 0.43. Earlier versions have no run_id."""
    with closing(sqlite3.connect(root / "my-project.db")) as connection:
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, {columns} "
            "timestamp TEXT NOT NULL, run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL)"
        )
        fields = "run_id, " * bool(columns) + "timestamp, run_name, step, metrics"
        for row in rows(step="step", norm="train/grad_norm", loss="train/loss"):
            values = ("7f",) * bool(columns) + ("2026-01-01T00:00:00", run, row.pop("step"), json.dumps(row))
            connection.execute(f"INSERT INTO metrics ({fields}) VALUES ({', '.join('?' * len(values))})", values)
        connection.commit()
    return root / "my-project.db"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "transformers": write_transformers,
    "lightning": write_lightning,
    "wandb chart": write_wandb,
    "wandb history": write_jsonl,
    "wandb offline": write_wandb_record,
    "tensorboard": write_events,
    "trackio": write_trackio,
    "directory of trackio": lambda root: write_trackio(root).parent,
    "old trackio": lambda root: write_trackio(root, columns=""),
    "list": lambda root: write_json(root / "x.json", rows(step="iteration", norm="gnorm", loss="training_loss")),
}


@pytest.mark.parametrize("tool", WRITERS)
def test_same_conclusions_as_of_a_recorder(tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = find_runs(WRITERS[tool](tmp_path))
    log = read(run)
    assert log.steps.tolist() == list(STEPS)
    np.testing.assert_allclose(log.norms, NORMS, rtol=1e-6)
    np.testing.assert_allclose(log.columns["loss"], LOSSES, rtol=1e-6)
    assert find_outcome(log).verdict == "healthy"
    recorded = read(write_run(tmp_path / "recorded", make_lines(NORMS, lambda step: {"loss": LOSSES[step - 1]})))
    assert suggest(log).max_norm == suggest(recorded).max_norm
    assert "one of 10 steps" in " ".join(log.unknown)
    for command in ("diagnose", "suggest", "blame"):
        assert main((command, str(run))) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "does not tell which steps were clipped" in out
        assert "% clipped," not in out
    assert main(("diagnose", str(run), "--json")) == 0
    (described,) = json.loads(capsys.readouterr().out)["runs"]
    assert described["clip_rate"] is None
    assert described["unknown"] == list(log.unknown)


def test_page_names_what_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_wandb(tmp_path)
    assert main(("report", str(run))) == 0
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in (" ".join(out.split()), page):
        assert "does not tell which steps were clipped" in text
        assert "No step was clipped" not in text


def test_runs_of_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trackio(tmp_path, "first")
    database = write_trackio(tmp_path, "second/part")
    assert find_runs(database) == [database / "first", database / "second/part"]
    assert main(("report", str(database))) == 0
    assert "second/part" in (tmp_path / "report.html").read_text()
    assert main(("suggest", str(database / "first"), "--norm", "train/grad_norm", "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["name"] == "first"
    for run, text in ((database / "third", "has no run third. It has first"), (tmp_path / "x.db", "not a Trackio")):
        (tmp_path / "x.db").write_text("a,b\n" * 1000)
        assert main(("suggest", str(run))) == 1
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1


def test_keys(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", rows(step="step", norm="how long", loss="how bad"))
    with pytest.raises(RunError, match=r"no gradient norm, only step, how long, how bad\. Pass .* --norm KEY"):
        read(path)
    assert len(read(path, keys=Keys("how long")).columns) == 1
    log = read(path, keys=Keys("how long", "how bad"))
    np.testing.assert_allclose(log.columns["loss"], LOSSES)
    with pytest.raises(RunError, match=r"--norm long: .* has no such column"):
        read(path, keys=Keys("long"))
    with pytest.raises(RunError, match=r"--loss bad: .* has no such column"):
        read(path, keys=Keys("how long", "bad"))
    assert main(("suggest", str(path), "--norm", "how long", "--loss", "how bad")) == 0
    assert main(("suggest", str(path), "--norm", "long")) == 1
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows(step="step", norm="how long", loss="how bad")))
    np.testing.assert_allclose(read(lines, keys=Keys("how long")).norms, NORMS)


def test_nested_objects(tmp_path: Path) -> None:
    lines = [
        {"_step": row["s"], "train": {"grad": {"norm": row["n"]}, "loss": row["l"]}}
        for row in rows(step="s", norm="n", loss="l")
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for keys in (Keys(), Keys("train.grad.norm", "train.loss"), Keys("train/grad/norm")):
        log = read(path, keys=keys)
        np.testing.assert_allclose(log.norms, NORMS)
        np.testing.assert_allclose(log.columns["loss"], LOSSES)


def test_tables_with_nan_for_values_of_other_rows(tmp_path: Path) -> None:
    """A step has one row for training and one for validation, before or after it."""
    nan = float("nan")
    table = []
    for i, row in enumerate(rows(step="step", norm="grad_norm", loss="loss")):
        pair = [row | {"val": nan}, {"step": row["step"], "grad_norm": nan, "loss": nan, "val": 1.0}]
        table += pair if i % 2 else reversed(pair)
    log = read(write_csv(tmp_path / "a.csv", table))
    np.testing.assert_allclose(log.norms, NORMS)
    np.testing.assert_allclose(log.columns["loss"], LOSSES)


def test_several_columns(tmp_path: Path) -> None:
    lines = [row | {"b - grad_norm": 1.0} for row in rows(step="Step", norm="a - grad_norm", loss="a - loss")]
    path = write_csv(tmp_path / "a.csv", lines)
    with pytest.raises(RunError, match=r"several columns for the norm: a - grad_norm, b - grad_norm\. Pass"):
        read(path)
    assert read(path, keys=Keys("a - grad_norm")).norms[0] == NORMS[0]


def test_loss_is_not_that_of_validation(tmp_path: Path) -> None:
    log = read(write_csv(tmp_path / "a.csv", rows(step="step", norm="grad_norm", loss="val_loss")))
    assert "loss" not in log.columns
    assert "no training loss" in " ".join(log.unknown)
    assert find_outcome(log).verdict == "unknown"


def test_norms_after_clipping_are_noticed(tmp_path: Path) -> None:
    lines = rows(step="step", norm="grad_norm", loss="loss")
    for line in lines:
        line["grad_norm"] = min(line["grad_norm"], 1.0)
    assert "probably norms after clipping" in read(write_csv(tmp_path / "a.csv", lines)).unknown[-1]


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "Infinity"])
def test_nonfinite_norms(tmp_path: Path, value: str) -> None:
    lines = rows(step="step", norm="grad_norm", loss="loss")
    lines[7]["grad_norm"] = value
    assert read(write_csv(tmp_path / "a.csv", lines)).finite.tolist() == [i != 7 for i in range(300)]


@pytest.mark.parametrize(
    ("name", "text", "excerpt"),
    [
        ("a.csv", "", "no column for the step"),
        ("a.csv", "grad_norm,loss\n1,2\n", "no column for the step"),
        ("a.csv", "step,grad_norm\n1,\n2,abc\n", "no step with a number"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"x": 1}', "neither a list of objects"),
        ("a.json", "[1, 2]", "no column for the step"),
        ("trainer_state.json", '{"log_history": []}', "no column for the step"),
        ("events.out.tfevents.1", "torn", "no column for the step"),
    ],
)
def test_invalid_files(tmp_path: Path, name: str, text: str, excerpt: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "tfevents" in name:
        pytest.importorskip("tensorboard")
    (tmp_path / name).write_text(text)
    assert main(("diagnose", str(tmp_path / name))) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert excerpt in err


def test_torn_file_of_wandb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = find_runs(write_wandb_record(tmp_path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # a job that is running
    assert read(path).steps.tolist() == list(STEPS)[:-1]
    path.write_bytes(whole[:100_000] + b"\0" * 100 + whole[100_100:])
    assert 0 < len(read(path).steps) < 300
    for damaged in (b":W&B\xe1\xbe\x01" + whole[7:], b"", b":W&B\xe1\xbe\x00"):
        path.write_bytes(damaged)
        assert main(("diagnose", str(path.parent))) == 1
        err = capsys.readouterr().err
        assert ("wandb sync" if damaged != whole[:7] else "no column for the step") in err
        assert err.count("\n") == 1


def test_runs_of_a_recorder_come_before_those_of_trackers(tmp_path: Path) -> None:
    write_wandb_record(tmp_path)
    write_trackio(tmp_path / "job")
    assert [run.name for run in find_runs(tmp_path / "job")] == ["calm-sea-0"]
    write_run(tmp_path / "job/recorded", make_lines(NORMS))
    (tmp_path / "job/other.db").write_text("of another program")
    assert find_runs(tmp_path / "job") == [tmp_path / "job/recorded"]


def test_runs_of_one_name_in_a_database(tmp_path: Path) -> None:
    database = write_trackio(tmp_path)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE metrics SET run_id = '0123456789ab' WHERE id > 100")
        connection.commit()
    runs = find_runs(tmp_path)
    assert [run.name for run in runs] == ["calm-sea-0 7f", "calm-sea-0 01234567"]
    assert [len(read(run).steps) for run in runs] == [100, 200]
