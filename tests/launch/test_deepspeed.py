"""Train with DeepSpeed: its launcher and torchrun, every stage and precision, checkpoints, bad gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.frameworks import skip_without
from tests.interpreter import forked_python
from tests.launch.jobs import (
    DEEPSPEED,
    ROOT,
    STATEFUL,
    assert_equal_runs,
    compare,
    read_rows,
    read_summary,
    run_command,
    succeed,
    train,
)

skip_without("deepspeed")

GPT = ["model=gpt", "model.layers=2", "data.length=10"]
MLP = ["model=mlp", "data=digits", "optim=adam"]
NUM_STEPS = 4
STAGES = (0, 2, 3)
"""Stages whose runs in float32 are compared with one process."""
RUNS = {
    "whole": [*STATEFUL, "steps=6"],
    "stopped": [*STATEFUL, "steps=5", "checkpoint.every=3"],
    **{f"gpt {n}": [*GPT, f"parallel=zero{n}"] for n in STAGES},
    **{f"bf16 {n}": [*MLP, f"parallel=zero{n}", "precision=bf16"] for n in range(4)},
    **{f"fp16 {n}": [*MLP, f"parallel=zero{n}", "precision=fp16", "precision.init_scale=256"] for n in (0, 2)},
    "overflow": [*MLP, "precision=fp16", "precision.init_scale=1e12"],
    "nan": ["parallel=zero3", "inject=one_nan", "inject.step=2", "inject.rank=1"],
    "spike": ["parallel=zero1", "inject=spike", "inject.step=2"],
    "own settings": [*MLP, "+parallel.place.config.zero_optimization.round_robin_gradients=true"],
}
SHORT = ["data.held_out=0.02", "log=quiet"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs in one job of DeepSpeed's launcher. Its output is in the file `out`."""
    cwd = tmp_path_factory.mktemp("job")
    # Without NPROC the launcher starts two ranks if there is no GPU.
    num_ranks = "2" if torch.cuda.is_available() else ""
    settings = [compare(RUNS), f"steps={NUM_STEPS}", "hydra.run.dir=two", *SHORT]
    command = ["bash", str(ROOT / "launch/deepspeed.sh"), *settings]
    (cwd / "out").write_text(
        succeed(run_command(cwd, *command, NPROC=num_ranks, PYTHON=str(forked_python(*DEEPSPEED)))), encoding="utf-8"
    )
    return cwd / "two"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    cwd = tmp_path_factory.mktemp("single")
    succeed(train(cwd, 1, "parallel=single", *GPT, f"steps={NUM_STEPS}", "hydra.run.dir=run", *SHORT))
    return cwd / "run"


@pytest.mark.parametrize("stage", STAGES)
def test_trains_as_one_process(job: Path, single: Path, stage: int) -> None:
    assert_equal_runs(job / f"gpt_{stage}", single, NUM_STEPS)


def test_resumes_bit_for_bit(job: Path, tmp_path: Path) -> None:
    settings = [*STATEFUL, "steps=6", f"resume={job / 'stopped'}", "hydra.run.dir=resumed", *SHORT]
    succeed(train(tmp_path, 2, "parallel=zero2", *settings))
    assert read_rows(tmp_path / "resumed") == read_rows(job / "whole")[3:]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "message"),
    [
        (2, "fsdp2", "fit the ZeRO stage that saved them, 2, not None"),
        (1, "zero2", "fit the number of ranks that saved them, not 1"),
    ],
)
def test_rejects_another_layout(job: Path, tmp_path: Path, num_ranks: int, parallel: str, message: str) -> None:
    settings = [*STATEFUL, "steps=6", f"resume={job / 'stopped'}", *SHORT]
    done = train(tmp_path, num_ranks, f"parallel={parallel}", *settings)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(("precision", "stages"), [("bf16", (0, 1, 2, 3)), ("fp16", (0, 2))])
def test_half_precision_agrees_between_stages(job: Path, precision: str, stages: tuple[int, ...]) -> None:
    first, *others = (read_rows(job / f"{precision}_{stage}") for stage in stages)
    assert first[-1]["loss"] < first[0]["loss"]
    for rows in others:
        for row, expected in zip(rows, first, strict=True):
            assert row == pytest.approx(expected, rel=0.03)


def test_handles_bad_gradients(job: Path) -> None:
    assert all(row["skipped"] for row in read_rows(job / "overflow"))
    summary = read_summary(job / "nan")
    assert summary["skipped"] == 1
    assert summary["incidents"][0]["culprits"] == [{"name": "0.weight", "nans": 1, "infs": 0, "ranks": [1]}]
    row = read_rows(job / "spike")[1]
    assert row["norm"] > 10
    assert row["coef"] == pytest.approx(1 / row["norm"], rel=1e-5)


def test_prints_no_log_of_deepspeed(job: Path) -> None:
    out = (job.parent / "out").read_text(encoding="utf-8")
    assert "INFO" not in out
    assert "DeepSpeed" not in out
