"""The real launcher when something goes wrong: bad gradients, small exponents, a job that is killed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_launcher import launch, rows

STATEFUL = ["model=lstm", "optim=adam", "clip=adagc", "clip.warmup=2"]  # memory in every place there is
HALF = ["model=mlp", "data=digits", "precision=fp16"]
BAD = ["inject.step=2", "inject.rank=1"]
RUNS = {
    "whole": [*STATEFUL, "steps=6"],
    "stopped": [*STATEFUL, "steps=5", "checkpoint.every=3"],
    "half": HALF,
    "half_too_large": [*HALF, "precision.init_scale=1e30"],
    "nan": ["inject=one_nan", *BAD],
    "nan_in_copies": ["inject=one_nan", "parallel=ddp", "on_nonfinite=zero", *BAD],
    "nan_on_a_stage": ["inject=one_nan", "parallel=pp", *BAD],
    "inf_in_a_flat_parameter": ["inject=one_inf", "parallel=fsdp1", "inject.parameter=cell", *BAD],
    "spike": ["inject=spike", *BAD],
}
RESUMED = ("fsdp2", "pp", "fsdp1")


def compare(runs: dict[str, list[str]]) -> str:
    return "+compare={" + ",".join(f"{name}:{changes}" for name, changes in runs.items()) + "}"


def train(cwd: Path, ranks: int, *overrides: str) -> str:
    done = launch(cwd, ranks, *overrides, "data.held_out=0.02", "log=quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def summary(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all that two ranks do first; what it printed is in `out`."""
    cwd = tmp_path_factory.mktemp("job")
    (cwd / "out").write_text(train(cwd, 2, compare(RUNS), "steps=4", "hydra.run.dir=two"), encoding="utf-8")
    # What a job leaves that is killed while it saves, to be taken for nothing.
    (cwd / "two/stopped/checkpoints/step_000004.unfinished").mkdir()
    return cwd


@pytest.fixture(scope="module")
def resumed(job: Path) -> Path:
    path = f"resume={job / 'two/stopped'}"
    train(job, 2, "-m", f"parallel={','.join(RESUMED)}", *STATEFUL, "steps=6", path, "hydra.sweep.dir=resumed")
    return job


@pytest.fixture(scope="module")
def single(job: Path) -> Path:
    runs = {"resumed": [*STATEFUL, "steps=6", f"resume={job / 'two/stopped'}"], "half": HALF}
    train(job, 1, "parallel=single", compare(runs), "steps=4", "hydra.run.dir=one")
    return job / "one"


def test_a_resumed_run_goes_on_bit_for_bit(resumed: Path) -> None:
    last = rows(resumed / "two/whole")[3:]
    assert [row["step"] for row in last] == [4, 5, 6]
    assert rows(resumed / "resumed/0") == last
    assert summary(resumed / "resumed/0")["held_out"] == summary(resumed / "two/whole")["held_out"]


@pytest.mark.parametrize("parallel", RESUMED[1:])
def test_it_goes_on_in_another_layout(resumed: Path, parallel: str) -> None:
    for row, one in zip(
        rows(resumed / f"resumed/{RESUMED.index(parallel)}"), rows(resumed / "two/whole")[3:], strict=True
    ):
        assert row == pytest.approx(one, rel=1e-4)


def test_it_goes_on_in_one_process(job: Path, single: Path) -> None:
    for row, one in zip(rows(single / "resumed"), rows(job / "two/whole")[3:], strict=True):
        assert row == pytest.approx(one, rel=1e-4)


def test_what_was_learned_before_matters(job: Path) -> None:
    """Otherwise the agreement above would say nothing."""
    first, *_, last = rows(job / "two/whole")
    assert last["loss"] < first["loss"]
    assert last["coef"] < 1


def test_half_precision_trains_as_in_one_process(job: Path, single: Path) -> None:
    for row, one in zip(rows(job / "two/half"), rows(single / "half"), strict=True):
        assert row == pytest.approx(one, rel=0.05)
    assert summary(job / "two/half")["skipped"] == 0


def test_a_loss_scale_that_is_too_large_is_found_out(job: Path) -> None:
    """The loss that is reported is without the scale."""
    assert all(row["skipped"] for row in rows(job / "two/half_too_large"))
    assert rows(job / "two/half_too_large")[0]["loss"] == rows(job / "two/half")[0]["loss"]


@pytest.mark.parametrize(
    ("run", "culprit"),
    [
        ("nan", {"name": "0.weight", "nans": 1, "infs": 0, "ranks": [1]}),
        ("nan_in_copies", {"name": "0.weight", "nans": 2, "infs": 0, "ranks": [0, 1]}),
        ("nan_on_a_stage", {"name": "2.cell.weight_ih_l0", "nans": 1, "infs": 0, "ranks": [1]}),
        ("inf_in_a_flat_parameter", {"nans": 0, "infs": 1, "ranks": [1]}),
    ],
)
def test_a_bad_gradient_is_survived_and_named(job: Path, run: str, culprit: dict[str, Any]) -> None:
    left = summary(job / "two" / run)
    zeroed = run == "nan_in_copies"
    assert (left["skipped"], left["zeroed"]) == ((0, 1) if zeroed else (1, 0))
    (incident,) = left["incidents"]
    assert (incident["step"], incident["action"]) == (2, "zero" if zeroed else "skip")
    (named,) = incident["culprits"]
    assert named.items() >= culprit.items()
    assert math.isfinite(left["held_out"])


def test_a_spike_is_clipped(job: Path) -> None:
    row = rows(job / "two/spike")[1]
    assert row["norm"] > 10
    assert row["coef"] == pytest.approx(1 / row["norm"], rel=1e-5)


def test_the_table_says_it_and_warnings_come_once(job: Path) -> None:
    out = (job / "out").read_text(encoding="utf-8")
    assert out.count("skipped") >= 1
    assert out.count("NonFiniteWarning") == 4  # one in each run with a bad gradient: rank 0 speaks for all


def test_a_resumed_run_is_refused_another_model(job: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, 1, "parallel=single", f"resume={job / 'two/stopped'}", "steps=6")
    assert done.returncode != 0
    assert "was trained with model=" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
