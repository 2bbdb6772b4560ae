"""MPI as a communicator, by mpi4py: a job needs no torch.distributed for it.

mpi4py starts MPI when it is imported, which takes a second: that happens with the first `MPIComm`, not before.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, DisagreementError
from .ranks import Ranks

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPIComm", "abort", "abort_on_exception", "mpi_size", "started"]

_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""What mpirun tells its processes: Open MPI's, then MPICH's and Intel's."""

_LIBRARIES = ("libmpi.so.40", "libmpi.so.12")
"""Names under which a loaded MPI can be asked: Open MPI, then MPICH and what is binary compatible with it."""


class MPIComm:
    """The ranks of one mpi4py communicator, in place of torch.distributed.

    ::

        from distclip.comm.mpi import MPIComm

        clipper = GradClipper(model, global_norm(1.0), comm=MPIComm())
        clip_grad_norm_(model, 1.0, comm=MPIComm())

    Ranks that hold different parameters say so as ever, with communicators of mpi4py in place of process groups::

        stage = MPIComm(MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2))  # the ranks of one pipeline
        clipper = GradClipper(model, policy, comm=MPIComm(), split_over={"pp": stage})

    Construct it on every rank of the communicator. Parameters of which nothing is said are taken as replicated, so that
    data-parallel ranks, which have averaged their gradients, decide together. Anywhere else in the program
    torch.distributed may be in use too, if its ranks are MPI's: see `distclip.integrations.mpi.init_process_group`.

    Args:
        comm: an intracommunicator that this rank belongs to; None for MPI.COMM_WORLD.
        abort: where there is more than one rank, let an exception that nobody catches end the whole job, see
            `abort_on_exception`: the others would wait for ever for a rank that is gone. It does not see `sys.exit(1)`:
            where only some ranks may call that, write `mpirun -n 4 python -m mpi4py script.py`.
        cuda_aware: hand CUDA tensors to MPI as they are, rather than through pinned memory of the host; None to ask the
            MPI library.

    Raises:
        ArgumentError: no communicator of this rank.
        DisagreementError: mpirun has started several processes and each of them is alone, as when the mpirun of one
            MPI starts Python with the library of another.

    Collectives: none at construction; afterwards one MPI collective in each method. Host syncs: for a CUDA tensor one,
    before MPI reads it.
    """

    def __init__(
        self, comm: MPI.Intracomm | None = None, *, abort: bool = True, cuda_aware: bool | None = None
    ) -> None:
        self._mpi = mpi = started()
        if comm is None:
            comm = mpi.COMM_WORLD
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise ArgumentError(
                f"comm={comm!r:.120}: expected an intracommunicator of mpi4py that this rank belongs to. Write "
                "MPIComm() for all ranks, or MPIComm(MPI.COMM_WORLD.Split(color)) with a color on each of them."
            )
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.ranks: Ranks = tuple(comm.group.Translate_ranks(range(comm.size), mpi.COMM_WORLD.group))
        self._cuda_aware = cuda_aware
        if abort and comm.size > 1:
            abort_on_exception()

    @property
    def identity(self) -> str:
        """The same text on all of its ranks, and on no other communicator's."""
        return f"mpi:{','.join(map(str, self.ranks))}"

    def sum_(self, tensor: Tensor) -> None:
        """One Allreduce (SUM), of any shape, strides and dtype; half precision is added up in float32."""
        self._allreduce_(torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor, self._mpi.SUM)

    def max_(self, tensor: Tensor) -> None:
        """One Allreduce (MAX). Pass no NaN: whether MPI's maximum keeps it depends on the order of the ranks."""
        self._allreduce_(tensor, self._mpi.MAX)

    def gather_objects(self, value: Any) -> list[Any]:
        """One allgather of pickles."""
        values: list[Any] = self.comm.allgather(value)
        return values

    def _allreduce_(self, tensor: Tensor, op: MPI.Op) -> None:
        values = tensor.detach()
        # MPI knows neither bfloat16 (Open MPI adds it up as integers, without a word) nor, everywhere, float16; and it
        # takes elements in the order of the storage.
        dtype, kind = self._travels_as(values.dtype)
        if values.is_cuda and not self._takes_cuda:
            travelling = torch.empty(values.shape, dtype=dtype, pin_memory=True).copy_(values)
        else:
            travelling = values.to(dtype).contiguous()
        if travelling.is_cuda:
            # MPI does not wait for kernels that are still to write what it reads.
            torch.cuda.current_stream(travelling.device).synchronize()
        memory = self._mpi.buffer.fromaddress(travelling.data_ptr(), travelling.nbytes)
        self.comm.Allreduce(self._mpi.IN_PLACE, [memory, travelling.numel(), kind], op)
        if travelling is not values:
            values.copy_(travelling, non_blocking=travelling.is_pinned())

    def _travels_as(self, dtype: torch.dtype) -> tuple[torch.dtype, MPI.Datatype]:
        if not dtype.is_floating_point:
            return torch.int64, self._mpi.INT64_T
        return (torch.float64, self._mpi.DOUBLE) if dtype == torch.float64 else (torch.float32, self._mpi.FLOAT)

    @functools.cached_property
    def _takes_cuda(self) -> bool:
        return _is_cuda_aware(self._mpi) if self._cuda_aware is None else self._cuda_aware


def started() -> Any:
    """`mpi4py.MPI`, imported, which starts MPI.

    Raises:
        DisagreementError: see `MPIComm`.
    """
    from mpi4py import MPI

    told = next((int(os.environ[name]) for name in _WORLD_SIZE if name in os.environ), 1)
    if told > 1 and MPI.COMM_WORLD.size == 1:
        raise DisagreementError(
            f"mpirun has started {told} processes, and MPI says that each of them is alone: it is not the mpirun of "
            f"the MPI library that mpi4py uses, {MPI.Get_library_version().split(',')[0].strip()}. Start the job with "
            "that one's, which for the PyPI wheels lies beside the interpreter: .venv/bin/mpirun."
        )
    return MPI


def mpi_size() -> int:
    """How many ranks the MPI job has; 1 where MPI has not been started."""
    mpi = _running()
    return 1 if mpi is None else int(mpi.COMM_WORLD.size)


@functools.cache
def abort_on_exception() -> None:
    """From now on an exception that nobody catches ends the whole MPI job, once its traceback is printed.

    Otherwise the rank would wait at its end for the others (MPI_Finalize), and they for it. Whatever `sys.excepthook`
    was before is called first. What it cannot see is `SystemExit`: see `MPIComm`.
    """
    before, process = sys.excepthook, os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            before(kind, error, trace)
        finally:
            if os.getpid() == process:  # and not a fork of it
                abort(1)

    sys.excepthook = hook


def abort(code: int) -> None:
    """End every process of the MPI job, this one with `code`; nothing happens where MPI has not been started.

    Collectives: none; it waits for nobody.
    """
    if (mpi := _running()) is None:
        return
    sys.stdout.flush()
    print(f"distclip: MPI rank {mpi.COMM_WORLD.rank} has failed, and the whole job ends.", file=sys.stderr, flush=True)
    mpi.COMM_WORLD.Abort(code)


def _running() -> Any:
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    return None if mpi is None or mpi.Is_finalized() else mpi


def _is_cuda_aware(mpi: Any) -> bool:
    """Whether the MPI library says that it reads memory of a GPU: as of MPI 4.1, or by an extension that is older."""
    info = mpi.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    if "cuda" in kinds:
        return True
    return any(map(_says_so, _LIBRARIES))


def _says_so(library: str) -> bool:
    try:
        loaded = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return bool(loaded.MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False
