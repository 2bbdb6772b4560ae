"""The real launcher with DeepSpeed: its own launcher and torchrun, every precision, checkpoints, bad gradients."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.launch.test_launcher import ROOT, environment, launch, rows
from tests.launch.test_recovery import compare, summary, train

pytest.importorskip("deepspeed")

STATEFUL = ["model=lstm", "optim=adam", "clip=adagc", "clip.warmup=2"]
SMALL = ["model=mlp", "data=digits", "optim=adam"]
RUNS = {
    "whole": [*STATEFUL, "steps=6"],
    "stopped": [*STATEFUL, "steps=5", "checkpoint.every=3"],
    **{f"bf16 {n}": [*SMALL, f"parallel=zero{n}", "precision=bf16"] for n in range(4)},
    **{f"fp16 {n}": [*SMALL, f"parallel=zero{n}", "precision=fp16", "precision.init_scale=256"] for n in range(4)},
    "too large": [*SMALL, "precision=fp16", "precision.init_scale=1e12"],
    "nan": ["parallel=zero3", "inject=one_nan", "inject.step=2", "inject.rank=1"],
    "spike": ["parallel=zero1", "inject=spike", "inject.step=2"],
    "own settings": [*SMALL, "+parallel.place.config.zero_optimization.round_robin_gradients=true"],
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start of DeepSpeed's launcher for all of it; what it printed is in `out`."""
    cwd = tmp_path_factory.mktemp("job")
    env = environment(NPROC="2" if torch.cuda.is_available() else "")  # two are what it starts where there is no GPU
    settings = ["steps=4", "data.held_out=0.02", "log=quiet", "hydra.run.dir=two"]
    command = ["bash", str(ROOT / "launch/deepspeed.sh"), compare(RUNS), *settings]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (cwd / "out").write_text(done.stdout, encoding="utf-8")
    return cwd / "two"


def test_a_resumed_run_goes_on_bit_for_bit(job: Path, tmp_path: Path) -> None:
    train(tmp_path, 2, "parallel=zero2", *STATEFUL, "steps=6", f"resume={job / 'stopped'}", "hydra.run.dir=resumed")
    assert rows(tmp_path / "resumed") == rows(job / "whole")[3:]


@pytest.mark.parametrize(
    ("ranks", "parallel", "said"),
    [(2, "fsdp2", "for the same stage (then 2, now None"), (1, "zero2", "as many ranks as have saved it, not 1")],
)
def test_elsewhere_it_is_refused(job: Path, tmp_path: Path, ranks: int, parallel: str, said: str) -> None:
    settings = [*STATEFUL, "steps=6", f"resume={job / 'stopped'}", "data.held_out=0.02"]
    done = launch(tmp_path, ranks, f"parallel={parallel}", *settings)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_the_same_at_every_stage(job: Path, precision: str) -> None:
    one, *others = (rows(job / f"{precision}_{stage}") for stage in range(4))
    assert one[-1]["loss"] < one[0]["loss"]
    for other in others:
        for row, expected in zip(other, one, strict=True):
            assert row == pytest.approx(expected, rel=0.03)


def test_bad_gradients(job: Path) -> None:
    assert all(row["skipped"] for row in rows(job / "too_large"))
    left = summary(job / "nan")
    assert left["skipped"] == 1
    assert left["incidents"][0]["culprits"] == [{"name": "0.weight", "nans": 1, "infs": 0, "ranks": [1]}]
    row = rows(job / "spike")[1]
    assert row["norm"] > 10
    assert row["coef"] == pytest.approx(1 / row["norm"], rel=1e-5)


def test_deepspeed_is_quiet(job: Path) -> None:
    out = (job.parent / "out").read_text(encoding="utf-8")
    assert "INFO" not in out
    assert "DeepSpeed" not in out
