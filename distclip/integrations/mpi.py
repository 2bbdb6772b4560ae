"""torch.distributed inside of an MPI job: `mpirun` in place of `torchrun`."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ..extend import ArgumentError, PeerError, abort_on_exception, started

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["init_process_group"]


def init_process_group(
    backend: str | None = None,
    *,
    comm: MPI.Intracomm | None = None,
    address: str | None = None,
    timeout: timedelta | None = None,
) -> None:
    """Start torch.distributed among the ranks of an MPI job, which say who they are and where they meet.

    ::

        from distclip.integrations.mpi import init_process_group  # mpirun -n 4 python script.py

        init_process_group()
        model = DistributedDataParallel(model)

    What a launcher would have left in the environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT) is set, over what another one may have left there. The port is one that is free. A rank that raises
    takes the job down: see `distclip.comm.mpi.abort_on_exception`.

    Args:
        backend: of `torch.distributed.init_process_group`; None for gloo, and NCCL for CUDA tensors where there is a
            GPU. Each rank then gets one of the GPUs of its machine as its current device.
        comm: whose ranks take part; None for MPI.COMM_WORLD.
        address: a name of this machine that the others can resolve, asked of the first rank alone; None for its host
            name, or for the loopback address where all ranks are on one machine.
        timeout: of the process group; None for torch's own.

    Raises:
        ArgumentError: torch.distributed has been started already.
        DisagreementError: see `distclip.comm.mpi.MPIComm`.
        PeerError: the first rank could not open a port.

    Collectives: one broadcast and one split over `comm`, and what torch does. Host syncs: none.
    """
    mpi = started()
    comm = mpi.COMM_WORLD if comm is None else comm
    if dist.is_initialized():
        raise ArgumentError(
            "torch.distributed has been started already, so its ranks and MPI's may differ. Call "
            "distclip.integrations.mpi.init_process_group() first, and in place of torch's."
        )
    if comm.size > 1:
        abort_on_exception()
    near = comm.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = near.rank, near.size
    near.Free()
    store, told = None, None
    if comm.rank == 0:
        host = address or ("127.0.0.1" if local_size == comm.size else socket.gethostname())
        store, told = _opened(host, comm.size)
    host, port, failure = comm.bcast(told)
    if failure is not None:
        raise PeerError(f"the first rank cannot listen at {host}: {failure}. Write address=, a name of that machine.")
    if store is None:
        store = TCPStore(host, port, comm.size, is_master=False)
    os.environ |= {
        "RANK": str(comm.rank),
        "WORLD_SIZE": str(comm.size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "nccl" in backend:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=comm.rank, world_size=comm.size, timeout=timeout)


def _opened(host: str, size: int) -> tuple[TCPStore | None, tuple[str, int, str | None]]:
    """A store at a free port of this machine, and what the others are told: where it is, or why there is none."""
    try:
        store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
    except Exception as error:
        return None, (host, 0, str(error))
    return store, (host, store.port, None)
