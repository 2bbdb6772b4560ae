"""Recover from failures: non-finite gradients, float16 overflow, a killed job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.launch.jobs import STATEFUL, compare, list_files, read_rows, read_summary, succeed, train

FLOAT16 = ["model=mlp", "data=digits", "precision=fp16"]
BAD = ["inject.step=2", "inject.rank=1"]
RUNS = {
    "whole": [*STATEFUL, "steps=6"],
    "stopped": [*STATEFUL, "steps=5", "checkpoint.every=3"],
    "fp16": FLOAT16,
    "fp16_overflow": [*FLOAT16, "precision.init_scale=1e30"],
    "nan": ["inject=one_nan", *BAD],
    "nan_in_replicas": ["inject=one_nan", "parallel=ddp", "on_nonfinite=zero", *BAD],
    "nan_on_a_stage": ["inject=one_nan", "parallel=pp", *BAD],
    "inf_in_a_flat_parameter": ["inject=one_inf", "parallel=fsdp1", "inject.parameter=cell", *BAD],
    "spike": ["inject=spike", *BAD],
}
RESUMED = ("fsdp2", "pp", "fsdp1")
SHORT = ["data.held_out=0.02", "log=quiet"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two ranks, in one job. Its output is in the file `out`."""
    cwd = tmp_path_factory.mktemp("job")
    done = train(cwd, 2, compare(RUNS), "steps=4", "hydra.run.dir=two", *SHORT)
    (cwd / "out").write_text(succeed(done) + done.stderr, encoding="utf-8")
    # A job that is killed while it saves leaves this folder, which must not be read as a checkpoint.
    (cwd / "two/stopped/checkpoints/step_000004.unfinished").mkdir()
    return cwd


@pytest.fixture(scope="module")
def resumed(job: Path) -> Path:
    path = f"resume={job / 'two/stopped'}"
    layouts = f"parallel={','.join(RESUMED)}"
    succeed(train(job, 2, "-m", layouts, *STATEFUL, "steps=6", path, "hydra.sweep.dir=resumed", *SHORT))
    return job


@pytest.fixture(scope="module")
def single(job: Path) -> Path:
    runs = {"resumed": [*STATEFUL, "steps=6", f"resume={job / 'two/stopped'}"], "fp16": FLOAT16}
    succeed(train(job, 1, "parallel=single", compare(runs), "steps=4", "hydra.run.dir=one", *SHORT))
    return job / "one"


def test_resumes_bit_for_bit(resumed: Path) -> None:
    last = read_rows(resumed / "two/whole")[3:]
    assert [row["step"] for row in last] == [4, 5, 6]
    assert read_rows(resumed / "resumed/0") == last
    assert read_summary(resumed / "resumed/0")["held_out"] == read_summary(resumed / "two/whole")["held_out"]


@pytest.mark.parametrize("parallel", RESUMED[1:])
def test_resumes_in_another_layout(resumed: Path, parallel: str) -> None:
    rows = read_rows(resumed / f"resumed/{RESUMED.index(parallel)}")
    for row, expected in zip(rows, read_rows(resumed / "two/whole")[3:], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_resumes_in_one_process(job: Path, single: Path) -> None:
    for row, expected in zip(read_rows(single / "resumed"), read_rows(job / "two/whole")[3:], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_training_and_clipping_take_place(job: Path) -> None:
    """Guards the tests above, which would also pass if nothing were trained or clipped."""
    first, *_, last = read_rows(job / "two/whole")
    assert last["loss"] < first["loss"]
    assert last["coef"] < 1


def test_rejects_another_model(job: Path, tmp_path: Path) -> None:
    done = train(tmp_path, 1, "parallel=single", f"resume={job / 'two/stopped'}", "steps=6")
    assert done.returncode != 0
    assert "was trained with model=" in done.stderr
    assert not list_files(tmp_path)


def test_rejects_another_policy(job: Path, tmp_path: Path) -> None:
    resume = f"resume={job / 'two/stopped'}"
    done = train(tmp_path, 1, "parallel=single", *STATEFUL, resume, "steps=6", "clip.per=model", *SHORT)
    assert done.returncode != 0
    assert "Use the clip settings of that run: clip.per=tensor" in done.stderr
    assert not list_files(tmp_path)


def test_float16_trains_as_in_one_process(job: Path, single: Path) -> None:
    for row, expected in zip(read_rows(job / "two/fp16"), read_rows(single / "fp16"), strict=True):
        assert row == pytest.approx(expected, rel=0.05)
    assert read_summary(job / "two/fp16")["skipped"] == 0


def test_skips_steps_with_a_too_large_loss_scale(job: Path) -> None:
    rows = read_rows(job / "two/fp16_overflow")
    assert all(row["skipped"] for row in rows)
    # The reported loss is unscaled.
    assert rows[0]["loss"] == read_rows(job / "two/fp16")[0]["loss"]


@pytest.mark.parametrize(
    ("run", "culprit"),
    [
        ("nan", {"name": "0.weight", "nans": 1, "infs": 0, "ranks": [1]}),
        ("nan_in_replicas", {"name": "0.weight", "nans": 2, "infs": 0, "ranks": [0, 1]}),
        ("nan_on_a_stage", {"name": "2.cell.weight_ih_l0", "nans": 1, "infs": 0, "ranks": [1]}),
        ("inf_in_a_flat_parameter", {"nans": 0, "infs": 1, "ranks": [1]}),
    ],
)
def test_names_the_non_finite_parameter(job: Path, run: str, culprit: dict[str, Any]) -> None:
    summary = read_summary(job / "two" / run)
    zeroed = run == "nan_in_replicas"
    assert (summary["skipped"], summary["zeroed"]) == ((0, 1) if zeroed else (1, 0))
    (incident,) = summary["incidents"]
    assert (incident["step"], incident["action"]) == (2, "zero" if zeroed else "skip")
    (named,) = incident["culprits"]
    assert named.items() >= culprit.items()
    assert math.isfinite(summary["held_out"])


def test_clips_a_spike(job: Path) -> None:
    row = read_rows(job / "two/spike")[1]
    assert row["norm"] > 10
    assert row["coef"] == pytest.approx(1 / row["norm"], rel=1e-5)


def test_prints_culprits_and_warns_once(job: Path) -> None:
    out = (job / "out").read_text(encoding="utf-8")
    assert "skipped" in out
    assert "non-finite gradients (nan): 0.weight (1 NaN on rank 1) at step 2\n" in out
    # Each of the four runs with a bad gradient warns on rank 0 only.
    assert out.count("NonFiniteWarning") == 4
