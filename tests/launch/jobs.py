"""Start training jobs and read the files of their runs.

`torchrun` calls the documented script. `train` forks ranks from a process that has loaded torch and Hydra before. Tests
use it unless they test the script itself, because it saves four seconds of CPU for each rank.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from tests.launch.kills import install_from_environment
from tests.ranks import raise_if_replicas_differ

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
FILES = {"config.yaml", "metrics.jsonl", "summary.json"}
"""Files of every run."""
TIMEOUT = 400
"""Seconds after which a job counts as hung."""

STATEFUL = ["model=lstm", "optim=adam", "clip=adagc", "clip.warmup=2"]
"""Overrides for a run with state in the model, the optimizer and the policy."""

Done = subprocess.CompletedProcess[str]

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "distclip.monitor.recorder",
    "hydra",
    "rich.progress",
    "sklearn.datasets",
]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a job. It has no variables of another launcher."""
    clean = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return clean | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def run_command(cwd: Path, *command: str, **variables: str) -> Done:
    """Run a command to its end. It may fail."""
    env = environment(**variables)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def torchrun(cwd: Path, num_ranks: int, *overrides: str) -> Done:
    """Train through `launch/torchrun.sh`."""
    return run_command(cwd, "bash", str(ROOT / "launch" / "torchrun.sh"), *overrides, NPROC=str(num_ranks))


def train(cwd: Path, num_ranks: int, *overrides: str) -> Done:
    """Train on forked ranks, with the variables that torchrun sets."""
    return train_again(cwd, agent_store(), num_ranks, *overrides)


def agent_store() -> dist.TCPStore:
    """Return a store in this process. Ranks connect to it, as they connect to torchrun's."""
    # The system picks the port.
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def train_again(cwd: Path, store: dist.TCPStore, num_ranks: int, *overrides: str, **variables: str) -> Done:
    """Train in another attempt of an elastic job.

    Args:
        cwd, num_ranks, overrides: see `train`.
        store: of all attempts.
        variables: of the ranks' environment.
    """
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **variables,
    }
    ranks = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(num_ranks)]
    return run_ranks(cwd, ranks, overrides)


def run_ranks(cwd: Path, environments: Sequence[Mapping[str, str]], overrides: Sequence[str]) -> Done:
    """Run launch/train.py in a forked process for each environment. If one fails, the others are ended."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        processes = [
            context.Process(
                target=_run_rank, args=(str(cwd), dict(env), list(overrides), str(out), str(err)), daemon=True
            )
            for env in environments
        ]
        deadline = time.monotonic() + TIMEOUT
        try:
            for process in processes:
                process.start()
            running = list(processes)
            while running and all(process.exitcode in (None, 0) for process in processes):
                assert wait([process.sentinel for process in running], timeout=deadline - time.monotonic()), "job hangs"
                running = [process for process in running if process.exitcode is None]
        finally:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        # Ranks that were ended have a negative code. The first positive one is that of the job.
        code = max(codes) or min(codes)
        return Done([str(TRAIN), *overrides], code, out.read_text("utf-8"), err.read_text("utf-8"))


def _run_rank(cwd: str, env: dict[str, str], overrides: list[str], out: str, err: str) -> None:
    """Run launch/train.py in this process, with its output in files."""
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    # OMP_NUM_THREADS is read when torch is loaded, which was before the fork.
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, str(TRAIN.parent))
    sys.argv = [str(TRAIN), *overrides]
    install_from_environment()
    raise_if_replicas_differ()
    runpy.run_path(str(TRAIN), run_name="__main__")


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
