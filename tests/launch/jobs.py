"""Start training jobs and read the files of their runs.

`torchrun` calls the documented script. `train` forks ranks from a process that has loaded torch and Hydra before. Tests
use it unless they test the script itself, because it saves four seconds of CPU for each rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.forks import TIMEOUT, Done, run_forked
from tests.ranks import raise_if_replicas_differ

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
FILES = {"config.yaml", "metrics.jsonl", "recorder.json", "summary.json"}
"""Files of every run."""
STATEFUL = ["model=lstm", "data.length=10", "optim=adam", "clip=adagc", "clip.warmup=2"]
"""Overrides for a run with state in the model, the optimizer and the policy."""
DEEPSPEED = ["deepspeed.runtime.zero.muon.muon_optimizer", "distclip.integrations.deepspeed"]
"""Modules that take a rank of DeepSpeed seconds to import."""

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a job. It has no variables of another launcher."""
    clean = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return clean | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def run_command(cwd: Path, *command: str, **variables: str) -> Done:
    """Run a command to its end. It may fail.

    Args:
        cwd: folder in which it runs.
        command: its words.
        variables: of its environment. Launchers start PYTHON, see `tests.interpreter`.
    """
    env = environment(**variables)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def torchrun(cwd: Path, num_ranks: int, *overrides: str) -> Done:
    """Train through `launch/torchrun.sh`."""
    return run_command(cwd, "bash", str(ROOT / "launch" / "torchrun.sh"), *overrides, NPROC=str(num_ranks))


def train(cwd: Path, num_ranks: int, *overrides: str) -> Done:
    """Train on forked ranks, with the variables that torchrun sets."""
    # A store in this process, as that of torchrun's agent. The system picks the port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(num_ranks)]
    return run_ranks(cwd, ranks, overrides)


def run_ranks(cwd: Path, environments: Sequence[Mapping[str, str]], overrides: Sequence[str]) -> Done:
    """Run launch/train.py in a forked process for each environment. If one fails, the others are ended."""
    return run_forked(TRAIN, cwd, environments, overrides, before=raise_if_replicas_differ)


def succeed(done: Done) -> str:
    """Return what a job has printed, which must have succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compare(runs: Mapping[str, Sequence[str]]) -> str:
    """Return the override that compares runs, given the overrides of each."""
    return "+compare={" + ",".join(f"{name}:{list(overrides)}" for name, overrides in runs.items()) + "}"


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the numbers of each step in metrics.jsonl, without the time."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    numbers = [{k: v for k, v in line.items() if not isinstance(v, list | dict)} for line in lines if "step" in line]
    return [{k: v for k, v in row.items() if k != "time"} for row in numbers]


def read_header(run: Path) -> dict[str, Any]:
    """Return the first line of metrics.jsonl."""
    header: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    return header


def read_summary(run: Path) -> dict[str, Any]:
    """Return summary.json."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return summary


def assert_equal_runs(run: Path, expected: Path, num_steps: int) -> None:
    """Compare a run with one of another layout: the numbers of each step, and the held-out loss."""
    rows, expected_rows = read_rows(run), read_rows(expected)
    assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected_row.keys()
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-5)
    assert read_summary(run)["held_out"] == pytest.approx(read_summary(expected)["held_out"], rel=1e-4)


def list_files(folder: Path) -> set[str]:
    """Return the relative paths of all files in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@dataclass
class Job:
    """A finished job: its output and its run directory."""

    directory: Path
    out: str

    def rows(self, run: str) -> list[dict[str, Any]]:
        return read_rows(self.directory / run)

    def summary(self, run: str) -> dict[str, Any]:
        return read_summary(self.directory / run)

    def files(self) -> set[str]:
        """Return all files of the job. It must have written nothing else into its folder."""
        outputs = self.directory.parent
        assert [path.name for path in (*outputs.parent.iterdir(), *outputs.iterdir())] == [
            "outputs",
            self.directory.name,
        ]
        return list_files(self.directory)
