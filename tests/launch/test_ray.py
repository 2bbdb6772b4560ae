"""Train on ranks of Ray Train, which are not started by torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import distclip
from tests.forks import Done
from tests.frameworks import skip_without
from tests.launch import ray_recovery
from tests.launch.jobs import ROOT, read_header, read_rows, run_command, succeed, train

# Not in the extra `dev` because it needs half a gigabyte: pip install 'ray[train]'.
skip_without("ray")


def train_on_ray(cwd: Path, *overrides: str) -> Done:
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), "steps=5", "hydra.run.dir=run", *overrides]
    return run_command(cwd, *command, RAY_USAGE_STATS_ENABLED="0")


def read_norms(cwd: Path) -> list[float]:
    assert read_header(cwd / "run")["world_size"] == 2
    return [row["norm"] for row in read_rows(cwd / "run")]


def test_trains_as_torchrun(tmp_path: Path) -> None:
    succeed(train_on_ray(tmp_path, "parallel=fsdp2"))
    other = tmp_path / "other"
    other.mkdir()
    succeed(train(other, 2, "steps=5", "hydra.run.dir=run", "parallel=fsdp2"))
    assert read_norms(tmp_path) == read_norms(other)


def test_failure_ends_the_job(tmp_path: Path) -> None:
    done = train_on_ray(tmp_path, "inject=one_nan", "inject.step=2", "on_nonfinite=raise")
    assert done.returncode != 0
    assert "NonFiniteError" in done.stdout + done.stderr


def test_policy_goes_on_from_a_checkpoint_of_ray(tmp_path: Path) -> None:
    """Ray starts the ranks again after a failure. The coefficients are those of one process without one."""
    script = ROOT / "tests" / "launch" / "ray_recovery.py"
    succeed(run_command(tmp_path, sys.executable, str(script), str(tmp_path), RAY_USAGE_STATS_ENABLED="0"))
    resumed_at, coefs = json.loads((tmp_path / "result.json").read_text())
    model, policy = ray_recovery.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = distclip.GradClipper(model, policy)
    expected = []
    for step in range(ray_recovery.NUM_STEPS):
        ray_recovery.loss_of(model, step, [0, 1]).backward()
        expected.append(float(clipper.step(optimizer).coef))
        optimizer.zero_grad()
    assert resumed_at == ray_recovery.FAILING_STEP
    assert coefs == pytest.approx(expected, rel=1e-5)
    # The outlier is clipped by the statistics of all steps before it.
    assert expected[6] < min(1.0, *expected[:6])
