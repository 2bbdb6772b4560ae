"""Communicate over torch.distributed."""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from ..errors import DisagreementError, PeerError
from .ranks import Ranks, rank_list
from .waiting import Meetings, meetings_of, patience, present_call, ranks_of_first_call

__all__ = ["MisplacedError", "ProcessGroupComm", "group_of_name"]

_LOG_AFTER = 60.0
"""Seconds that a rank waits in a collective before it logs which ranks are missing. DISTCLIP_PATIENCE overrides it."""

_LIMITED = ("gloo", "distclip_simulated")
"""Backends that can wait for a collective for a limited time."""

_MAX_KEPT = 2**16
"""Number of elements of the largest tensor that is kept until the next collective."""

_PATIENCE = 0.1
"""Seconds to wait at the exit of the process for threads of gloo."""

_used: weakref.WeakSet[ProcessGroupComm] = weakref.WeakSet()

_derived: weakref.WeakValueDictionary[str, ProcessGroupComm] = weakref.WeakValueDictionary()
"""Communicators that are derived from layouts, by the name of their meetings."""


class MisplacedError(DisagreementError):
    """This rank has left a group within a collective that cannot end.

    Args:
        left: communicator over the group.
        comm: smaller communicator whose ranks wait for this one. All of them fail together if this rank continues over
            it with an error.
        first_call: global ranks that wait for this one in their first call. They fail in the same way.

    Without `comm` and `first_call`, another rank has already left the group, so its ranks need a new one.
    """

    def __init__(
        self, left: ProcessGroupComm, comm: ProcessGroupComm | None = None, first_call: Ranks | None = None
    ) -> None:
        self.left, self.comm, self.first_call = left, comm, first_call
        super().__init__(
            f"this rank has parameters on a mesh of {rank_list(left.ranks)}, and some of these ranks make this call "
            "without. Pass the parameters of a mesh on every rank of it."
        )


class ProcessGroupComm:
    """Communicator over the ranks of one torch.distributed process group.

    Numbers travel on the device that the group's backend serves, whatever device the gradients are on. A rank without
    gradients and a rank with CPU-offloaded gradients therefore enter the same collective.

    Args:
        group: a process group that this rank belongs to.
        covers_holders: True for a group derived from layouts, on which every rank holds parameters, in the same
            layouts.
        session: number of the initialization of torch.distributed, for a group derived from layouts.
    """

    def __init__(self, group: dist.ProcessGroup, *, covers_holders: bool = False, session: int = 0) -> None:
        self.group, self.covers_holders = group, covers_holders
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.device = _device(group)
        # This is the tensor of the last collective, which threads of gloo may still hold. None after a gather of
        # objects.
        self.sent: Tensor | None = None
        self._meetings = _meetings_of(group, session)
        # An accelerator's host does not wait in an all-reduce, and torch's own watchdog reports missing ranks there.
        # Backends for the CPU other than gloo cannot wait for a limited time.
        backend = dist.get_backend(group)
        is_limited = self.device.type == "cpu" and any(one in backend for one in _LIMITED)
        self._log_after = patience(_LOG_AFTER) if is_limited else None
        self._is_gloo = is_limited and "gloo" in backend
        _used.add(self)
        if covers_holders:
            _derived[self._meetings.name] = self

    @property
    def is_left(self) -> bool:
        """True if the group cannot be used any more, because a rank has left it within a collective."""
        return self._meetings.is_left

    def move_to(self, group: dist.ProcessGroup, session: int) -> None:
        """Use another process group over the same ranks."""
        self.group = group
        self._meetings = _meetings_of(group, session)
        _derived[self._meetings.name] = self

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over ranks. Collectives: one all-reduce (SUM)."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its maximum over ranks. Collectives: one all-reduce (MAX)."""
        self._all_reduce(tensor, dist.ReduceOp.MAX)

    def start_sum(self, tensor: Tensor) -> tuple[Callable[[], bool], Callable[[], None]]:
        """Begin a sum, see `distclip.comm.start_sum`. Collectives: one asynchronous all-reduce."""
        on_device = tensor.to(self.device)
        number = self._enter()
        work = dist.all_reduce(on_device, group=self.group, async_op=True)
        assert work is not None

        def wait() -> None:
            try:
                self._wait(work, number)
            except RuntimeError as error:
                raise self._lost(error) from error
            self.sent = on_device if on_device.numel() <= _MAX_KEPT else None
            if on_device is not tensor:
                tensor.copy_(on_device)

        return work.is_completed, wait

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`. Collectives: one all_gather_object."""
        values: list[Any] = [None] * self.size
        number = self._enter()
        try:
            with self._watched("gather", number):
                dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise self._lost(error, "a gather") from error
        self.sent = None
        return values

    def _all_reduce(self, tensor: Tensor, op: Any) -> None:
        on_device = tensor.to(self.device)
        number = self._enter()
        try:
            work = begin_all_reduce(on_device, op, self.group)
            if work is not None:
                self._wait(work, number)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.sent = on_device if on_device.numel() <= _MAX_KEPT else None
        # `to` copies only between devices, so that the result of most calls is in place already.
        if on_device is not tensor:
            tensor.copy_(on_device)

    def _enter(self) -> int:
        """Count a collective when it is entered."""
        if self._meetings.is_left:
            raise MisplacedError(self)
        self._meetings.num_entered += 1
        return self._meetings.num_entered

    def _lost(self, error: RuntimeError, kind: str = "an all-reduce") -> PeerError:
        """Return the error for a collective that has failed."""
        calls = self._meetings.exchange_calls(present_call()) if self._is_gloo else {}
        known = "".join(f" {rank_list(ranks).capitalize()} made {call}." for call, ranks in calls.items())
        return PeerError(
            f"{kind} over {rank_list(self.ranks)} failed: {error!s:.300}{known} A rank has ended, or has "
            "left out this call, or has made another one. Make the same calls on every rank."
        )

    def _wait(self, work: dist.Work, number: int) -> None:
        """Wait for an all-reduce. After a while, log which ranks have not entered it.

        Raises:
            MisplacedError: the all-reduce cannot end, and this rank has left the group.
        """
        if self._log_after is None:
            work.wait()
            return

        def has_ended(seconds: float) -> bool:
            try:
                work.wait(timedelta(seconds=min(seconds, 1e6)))
            except RuntimeError:
                # Either the time has passed, or the all-reduce has failed.
                if work.is_completed():
                    raise
                if self._is_gloo:
                    self._meetings.raise_if_failed(number)
                return False
            return True

        try:
            if has_ended(self._log_after):
                return
            other = self._meetings.wait("all-reduce", number, has_ended, may_leave=self.covers_holders)
            if other is not None:
                raise MisplacedError(self, _derived.get(other), ranks_of_first_call(other))
        finally:
            if not work.is_completed():
                # The group is kept alive, because its destructor would wait for the all-reduce.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        work.wait()

    @contextmanager
    def _watched(self, kind: str, number: int) -> Iterator[None]:
        """Log which ranks are missing if the block takes long. Torch gathers objects without a time limit."""
        if self._log_after is None or not self._is_gloo:
            yield
            return
        is_done = threading.Event()

        def report() -> None:
            self._meetings.wait(kind, number, is_done.wait, may_leave=False)

        timer = threading.Timer(min(self._log_after, threading.TIMEOUT_MAX), report)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            is_done.set()
            timer.cancel()


def _meetings_of(group: dist.ProcessGroup, session: int) -> Meetings:
    ranks = tuple(dist.get_process_group_ranks(group))
    # Groups of disjoint ranks can have the same name.
    return meetings_of(group, f"{session}/{group.group_name}/{ranks[0]}", ranks, dist.get_rank())


def begin_all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> Any:
    """Begin an all-reduce, and return the work to wait for."""
    return dist.all_reduce(tensor, op=op, group=group, async_op=True)


@atexit.register
def await_gloo() -> None:
    """Wait until the threads of gloo hold no tensor of the last collectives.

    A thread that drops a tensor while Python shuts down aborts the process (pytorch #190489). The thread drops the
    tensor within microseconds after the collective, but a process may end sooner.
    """
    end, last = time.monotonic() + _PATIENCE, [comm.sent for comm in list(_used) if comm.device.type == "cpu"]
    for sent in last:
        while sent is not None and sent._use_count() > 1 and time.monotonic() < end:  # type: ignore[attr-defined]
            time.sleep(0.001)
    # torch's own tensors of a gather of objects cannot be seen from here.
    if None in last:
        time.sleep(_PATIENCE / 5)


def group_of_name(name: str) -> dist.ProcessGroup:
    """Return the process group of a name, which is the same on all of its ranks."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return the device of a group's collectives."""
    # Only the backend determines it, and never a tensor of this rank, because all ranks need the same kind of device.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
