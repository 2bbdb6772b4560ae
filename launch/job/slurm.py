"""Find the ranks of a job that srun has started without torchrun: `srun python launch/train.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["first_host", "tasks_on_node", "torchrun_variables"]

_FIRST_PORT, _NUM_PORTS = 20000, 10000


def torchrun_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torchrun would set, for a task of srun.

    Args:
        environ: environment of the task.

    Returns:
        An empty dictionary outside of srun, for a single task, and below torchrun or mpirun.
    """
    started_by_others = {"RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & environ.keys()
    # A batch script is a task too. It has the job's number of tasks and ENVIRONMENT=BATCH, and the tasks that it starts
    # inherit them. Only srun sets the number of tasks of a step.
    is_batch = environ.get("ENVIRONMENT") == "BATCH"
    size = environ.get("SLURM_STEP_NUM_TASKS", "1" if is_batch else environ.get("SLURM_NTASKS", "1"))
    if started_by_others or size == "1" or "SLURM_PROCID" not in environ:
        return {}
    # All tasks of a step compute the same port. Steps that run at the same time on a node compute different ports.
    step = 31 * int(environ.get("SLURM_JOB_ID", "0")) + int(environ.get("SLURM_STEP_ID", "0"))
    node = int(environ.get("SLURM_NODEID", "0"))
    local_size = tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", size), node)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_FIRST_PORT + step % _NUM_PORTS),
    }


def first_host(nodelist: str) -> str:
    """Return the first host in a node list of Slurm.

    >>> first_host("gpu-[007-010,12],login1"), first_host("login1,gpu-7"), first_host("rack[2-3]-node[1-4]")
    ('gpu-007', 'login1', 'rack2-node1')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodelist)


def tasks_on_node(counts: str, node: int) -> int:
    """Return the number of tasks on a node.

    Args:
        counts: numbers of tasks, such as "4(x2),3" for four tasks on each of two nodes and three on the next.
        node: index of the node.

    >>> [tasks_on_node("4(x2),3", node) for node in range(3)]
    [4, 4, 3]
    """
    numbers: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        numbers += [int(number)] * int(times or 1)
    return numbers[node]
