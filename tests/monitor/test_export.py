"""Exported files have the numbers of the run, under the names of the recorder."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.log import Log, read
from distclip.monitor.cli import main
from tests.logs import HEADER, make_lines, write_and_read

NORMS = np.exp(np.random.default_rng(0).normal(0, 0.3, 120))
NORMS[40] = np.nan


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Return a run with a spike, a step that is not finite, and norms of two tensors."""
    fields: dict[int, Any] = {7: {"spike": 5.0, "ids": [3, "x"], "worst": {"rank": 1, "tensor": "a", "share": 0.5}}}
    lines = make_lines(
        NORMS, lambda step: {"tensor_norms": [0.5 * step, 2.0], "time": 1e9 + step, **fields.get(step, {})}
    )
    return write_and_read(tmp_path / "run", {**HEADER, "tensors": ["a", "b"]}, lines)


def test_csv(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "run"), "--to", "csv", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == [str(tmp_path / "run/export" / name) for name in ("steps.csv", "tensors.csv")]
    assert document["runs"][0]["steps"] == 120
    rows, tensors = (list(csv.DictReader(Path(path).read_text().splitlines())) for path in document["files"])
    norms = [float(row["norm"]) if row["norm"] else np.nan for row in rows]
    np.testing.assert_array_equal(norms, log.norms)
    assert (rows[6]["spike"], json.loads(rows[6]["ids"]), rows[6]["worst_tensor"]) == ("5.0", [3, "x"], "a")
    assert rows[40]["finite"] == "0"
    assert tensors[4] == {"step": "3", "tensor": "a", "norm": "1.5", "peak": "1.5"}
    # The commands read it as a log of another tool.
    np.testing.assert_array_equal(read(Path(document["files"][0])).norms, log.norms[np.isfinite(log.norms)])


def test_parquet(log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(["export", str(tmp_path / "run"), "--to", "parquet", "--out", str(tmp_path / "out")]) == 0
    assert "steps.parquet" in capsys.readouterr().out
    steps = parquet.read_table(tmp_path / "out/steps.parquet").to_pydict()
    assert steps["norm"][:3] == log.norms[:3].tolist()
    assert steps["norm"][40] is None
    tensors = parquet.read_table(tmp_path / "out/tensors.parquet").to_pydict()
    assert [tensors[key][4] for key in ("step", "tensor", "norm", "peak")] == [3, "a", 1.5, 1.5]


def test_tensorboard(log: Log, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(["export", str(tmp_path / "run"), "--to", "tensorboard", "--out", str(tmp_path / "events")]) == 0
    events = read(tmp_path / "events")
    np.testing.assert_allclose(events.norms, log.norms[np.isfinite(log.norms)], rtol=1e-6)
    assert "clip/tensor_norms/a" in events.columns


def test_wandb(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    run = SimpleNamespace(dir=str(tmp_path), log=logged.append, finish=lambda: logged.append({}))
    run.define_metric = lambda name, step_metric=None: None
    settings: dict[str, Any] = {}
    module = SimpleNamespace(init=lambda **options: settings.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert main(["export", str(tmp_path / "run"), "--to", "wandb"]) == 0
    assert settings["config"]["batch"] == 16
    assert len(logged) == 121
    assert logged[2]["clip/step"] == 3
    assert logged[2]["clip/norm"] == log.norms[2]
    assert logged[2]["clip/tensor_norms/a"] == 1.5
    assert "clip/norm" not in logged[40]


def test_a_missing_package_is_one_line(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["export", str(log.path), "--to", "wandb"]) == 1
    err = capsys.readouterr().err
    assert "pip install wandb" in err
    assert err.count("\n") == 1
