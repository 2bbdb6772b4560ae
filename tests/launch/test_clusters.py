"""Start jobs as the nodes of a cluster do, with the commands and variables of Slurm and Kubeflow replaced."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.interpreter import forked_python
from tests.launch.jobs import ROOT, environment, read_header, read_rows

yaml = pytest.importorskip("yaml")
pytest.importorskip("hydra")
pytestmark = pytest.mark.slow

SHORT = ["steps=3", "log=quiet", "model=mlp", "data=digits", "hydra.run.dir=run"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_together(folder: Path, jobs: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
    """Run commands that wait for each other, in a folder with launch/."""
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment(**variables, PYTHON=str(forked_python())),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, variables in jobs
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(jobs), "\n".join(outputs)


# Training itself is the same as with torchrun on one node.
TRAIN = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
ranks = torch.ones(1)
dist.all_reduce(ranks)
if dist.get_rank() == 0:
    with open("world", "w") as file:
        print(int(ranks), *sys.argv[1:], file=file)
dist.destroy_process_group()
"""

# srun starts the command on every node at once, and ends all of them if one fails.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
pids=()
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || { kill "${pids[@]}"; exit 1; }; done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n'
"""


def slurm_environment(folder: Path) -> dict[str, str]:
    """Return the variables of a Slurm job on two nodes, with Slurm's commands on the PATH."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "JOB_ID": "77", "CPUS_PER_TASK": "2"}
    variables = {f"SLURM_{name}": value for name, value in job.items()}
    return {**variables, "PATH": f"{commands}:{os.environ['PATH']}", "PORT": str(free_port()), "NPROC": "1"}


def test_slurm_starts_one_world(tmp_path: Path) -> None:
    launch = tmp_path / "launch"
    launch.mkdir()
    for script in [
        *(ROOT / "launch").glob("*.sh"),
        ROOT / "launch" / "check_overrides.py",
        ROOT / "launch" / "run_torchrun.py",
    ]:
        (launch / script.name).symlink_to(script)
    (launch / "train.py").write_text(TRAIN)
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "clip=zclip", "steps=3"]
    run_together(tmp_path, [(command, slurm_environment(tmp_path))])
    assert (tmp_path / "world").read_text() == "2 clip=zclip steps=3\n"


def test_slurm_needs_the_root_of_the_repository(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(ROOT / "launch" / "slurm.sbatch")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "root of the repository" in done.stderr


def pods(spec: Mapping[str, Any], port: int) -> list[tuple[list[str], dict[str, str]]]:
    """Return the command and environment of each pod, as Kubeflow's training operator 1.9 sets them (envvar.go)."""
    kinds = spec["pytorchReplicaSpecs"]
    count = sum(kind["replicas"] for kind in kinds.values())
    jobs = []
    for kind in ("Master", "Worker"):
        for _ in range(kinds[kind]["replicas"]):
            (container,) = kinds[kind]["template"]["spec"]["containers"]
            assert container["name"] == "pytorch"
            own = {variable["name"]: variable["value"] for variable in container.get("env", [])}
            rank = str(len(jobs))
            ranks = {"RANK": rank, "PET_NODE_RANK": rank, "PET_NNODES": str(count)}
            ranks |= {"WORLD_SIZE": str(count * int(spec["nprocPerNode"])), "PET_NPROC_PER_NODE": spec["nprocPerNode"]}
            head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            jobs.append(
                (
                    [*container["command"], *container.get("args", [])],
                    {**own, **ranks, **head, **{f"PET_{name}": value for name, value in head.items()}},
                )
            )
    return jobs


def test_both_kubernetes_jobs_run_the_same() -> None:
    """`launch/trainjob.yaml` runs the command of `launch/k8s.yaml` in as many pods and ranks."""
    old, new = (
        yaml.safe_load((ROOT / "launch" / name).read_text(encoding="utf-8"))["spec"]
        for name in ("k8s.yaml", "trainjob.yaml")
    )
    (container,) = old["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert {key: new["trainer"][key] for key in ("image", "command", "args", "env")} == {
        key: container[key] for key in ("image", "command", "args", "env")
    }
    assert new["trainer"]["resourcesPerNode"] == container["resources"]
    assert new["trainer"]["numNodes"] == sum(kind["replicas"] for kind in old["pytorchReplicaSpecs"].values())
    assert str(new["trainer"]["numProcPerNode"]) == old["nprocPerNode"]


def test_kubernetes_starts_one_world(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "launch" / "k8s.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    job["spec"]["nprocPerNode"] = "1"
    jobs = pods(job["spec"], free_port())
    assert all(command[0] == "python" for command, _ in jobs)
    for part in ("launch", "conf"):
        (tmp_path / part).symlink_to(ROOT / part)
    run_together(tmp_path, [([str(forked_python()), *command[1:], *SHORT], variables) for command, variables in jobs])
    assert len(read_rows(tmp_path / "run")) == 3
    assert read_header(tmp_path / "run")["world_size"] == 2
