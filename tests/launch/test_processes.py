"""Start the right number of processes, and end them together."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from job.slurm import torchrun_variables
from tests.interpreter import forked_python
from tests.launch.jobs import ROOT, environment, run_ranks

pytest.importorskip("hydra")

# nvidia-smi of a machine with four GPUs.
NVIDIA_SMI = "#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: H100; done\n"


@pytest.mark.parametrize(
    ("has_gpus", "variables", "expected"),
    [
        (True, {}, 4),
        (True, {"CUDA_VISIBLE_DEVICES": "1,3"}, 2),
        (True, {"CUDA_VISIBLE_DEVICES": "2"}, 1),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, 2),
        (True, {"NPROC": "3"}, 3),
        (False, {}, 2),
        (False, {"NPROC": "1"}, 1),
        (False, {"NPROC": "gpu"}, "gpu"),
    ],
)
def test_number_of_ranks(tmp_path: Path, has_gpus: bool, variables: dict[str, str], expected: int | str) -> None:
    if has_gpus:
        (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
        (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}"} | variables
    command = ["bash", "-euo", "pipefail", "-c", f'source {ROOT}/launch/ranks.sh; echo "$NPROC $OMP_NUM_THREADS"']
    num_ranks, num_threads = subprocess.check_output(command, env=env, text=True).split()
    assert num_ranks == str(expected)
    processors = os.sysconf("SC_NPROCESSORS_ONLN")
    assert int(num_threads) == (max(1, processors // expected) if isinstance(expected, int) else 1)


LEAVE = """
import time
from pathlib import Path

import torch.distributed as dist

from job import processes

store = dist.FileStore("store")
dist.init_process_group("gloo", store=store, rank=processes.RANK, world_size=processes.WORLD_SIZE)
ready = Path("ready")
if processes.RANK == 1:
    time.sleep(3)
    ready.touch()
processes.leave()
assert ready.exists()
assert not dist.is_initialized()
"""


def test_ranks_leave_together(tmp_path: Path) -> None:
    # A process that exits before gloo's threads have released their tensors would abort.
    ranks = [
        subprocess.Popen(
            [str(forked_python()), "-c", LEAVE],
            cwd=tmp_path,
            env=environment(RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=f"{ROOT / 'launch'}:{ROOT}"),
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]


def test_tasks_of_srun_join(tmp_path: Path) -> None:
    """Two tasks of srun train together, although no torchrun gives them a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2", "MASTER_PORT": port}
    tasks = [environment(SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **step) for task in range(2)]
    done = run_ranks(tmp_path, tasks, ["parallel=ddp", "steps=3", "log=quiet"])
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "ENVIRONMENT": "BATCH"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": "4"},
    ],
    ids=["elsewhere", "batch script", "one task", "allocation"],
)
def test_single_tasks_have_no_peers(others: dict[str, str]) -> None:
    assert torchrun_variables(others) == {}


def test_two_variables_are_enough() -> None:
    task = torchrun_variables({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"})
    assert (task["RANK"], task["WORLD_SIZE"], task["LOCAL_WORLD_SIZE"]) == ("3", "4", "4")


@pytest.mark.parametrize("launcher", ["RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_other_launchers_within_srun_give_the_ranks(launcher: str) -> None:
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}
    assert torchrun_variables(step)["LOCAL_WORLD_SIZE"] == "4"
    assert torchrun_variables({**step, launcher: "3"}) == {}
