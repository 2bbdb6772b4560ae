"""Ray Train's own ranks run the training job: what a rank is told comes from Ray, not from torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_launcher import ROOT, environment, launch, rows

# Half a gigabyte with what it needs, so not among the packages of `dev`: pip install 'ray[train]'.
pytest.importorskip("ray.train")


def on_ray(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    env = environment(RAY_USAGE_STATS_ENABLED="0")
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), "steps=5", "hydra.run.dir=run", *overrides]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)


def norms(folder: Path) -> list[float]:
    header = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0]
    assert json.loads(header)["world_size"] == 2
    return [row["norm"] for row in rows(folder / "run")]


def test_trains_as_torchrun_does(tmp_path: Path) -> None:
    done = on_ray(tmp_path, "parallel=fsdp2")
    assert done.returncode == 0, done.stdout + done.stderr
    beside = tmp_path / "beside"
    beside.mkdir()
    launch(beside, 2, "steps=5", "hydra.run.dir=run", "parallel=fsdp2").check_returncode()
    assert norms(tmp_path) == norms(beside)


def test_a_failure_ends_the_job(tmp_path: Path) -> None:
    done = on_ray(tmp_path, "inject=one_nan", "inject.step=2", "on_nonfinite=raise")
    assert done.returncode != 0
    assert "NonFiniteError" in done.stdout + done.stderr
