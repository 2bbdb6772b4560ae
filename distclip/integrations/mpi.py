"""Start torch.distributed in an MPI job, so that `mpirun` replaces `torchrun`."""

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
    """Start torch.distributed among the ranks of an MPI job.

    ::

        from distclip.integrations.mpi import init_process_group  # mpirun -n 4 python script.py

        init_process_group()
        model = DistributedDataParallel(model)

    It sets the environment that torchrun would set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), and overwrites the values of another launcher. It picks a free port. A rank that raises ends the job:
    see `distclip.comm.mpi.abort_on_exception`.

    Args:
        backend: see `torch.distributed.init_process_group`. None for gloo, plus NCCL for CUDA tensors if there is a
            GPU. With NCCL, each rank gets one of the GPUs of its machine as its current device.
        comm: the communicator whose ranks take part. None for MPI.COMM_WORLD.
        address: a name of the first rank's machine that the other ranks can resolve. Only the first rank's value is
            read. None for the host name, or for the loopback address if all ranks are on one machine.
        timeout: timeout of the process group. None for torch's default.

    Raises:
        ArgumentError: torch.distributed has been started already.
        DisagreementError: see `distclip.comm.mpi.MPIComm`.
        PeerError: the first rank could not open a port. Raised on every rank.

    Collectives: one broadcast and one split over `comm`, and those of torch. Host syncs: none.
    """
    mpi = started()
    comm = mpi.COMM_WORLD if comm is None else comm
    if dist.is_initialized():
        raise ArgumentError(
            "torch.distributed has been started already, so its ranks may differ from MPI's. Call "
            "distclip.integrations.mpi.init_process_group() first, instead of torch's."
        )
    if comm.size > 1:
        abort_on_exception()
    machine = comm.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = machine.rank, machine.size
    machine.Free()
    # The first rank opens a store on a free port, and broadcasts its address or the reason why there is none.
    store, message = None, None
    if comm.rank == 0:
        host = address or ("127.0.0.1" if local_size == comm.size else socket.gethostname())
        store, port, error = _open_store(host, comm.size)
        message = host, port, error
    host, port, error = comm.bcast(message)
    if error is not None:
        raise PeerError(f"the first rank cannot listen at {host}: {error}. Pass address=, a name of that machine.")
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


def _open_store(host: str, size: int) -> tuple[TCPStore | None, int, str | None]:
    """Open a store on a free port of this machine.

    Returns:
        (store, port, None), or (None, 0, the error's text).
    """
    try:
        store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
    except Exception as error:
        return None, 0, str(error)
    return store, store.port, None
