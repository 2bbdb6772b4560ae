"""Ray Train's own ranks run the training job: what a rank is told comes from Ray, not from torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Half a gigabyte with what it needs, so not among the packages of `dev`: pip install 'ray[train]'.
pytest.importorskip("ray.train")
ROOT = Path(__file__).parents[2]


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), "steps=5", "hydra.run.dir=run", *overrides]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)


def norms(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    header, *steps = map(json.loads, lines)
    assert header["world_size"] == 2
    return [line["norm"] for line in steps if "step" in line]


def test_trains_as_torchrun_does(tmp_path: Path) -> None:
    done = launch(tmp_path, "parallel=fsdp2")
    assert done.returncode == 0, done.stdout + done.stderr
    beside = tmp_path / "beside"
    beside.mkdir()
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "steps=5", "hydra.run.dir=run", "parallel=fsdp2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "2"}
    subprocess.run(command, cwd=beside, env=env, capture_output=True, check=True)
    assert norms(tmp_path) == norms(beside)


def test_a_failure_ends_the_job(tmp_path: Path) -> None:
    done = launch(tmp_path, "inject=one_nan", "inject.step=2", "on_nonfinite=raise")
    assert done.returncode != 0
    assert "NonFiniteError" in done.stdout + done.stderr
