"""Communicate over torch.distributed."""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, _resolve_process_group
from torch.distributed import distributed_c10d

from ..errors import PeerError
from .ranks import rank_list

__all__ = ["ProcessGroupComm", "group_of_name", "patience"]

_log = logging.getLogger("distclip")

_LOG_AFTER = 60.0
"""Seconds that a rank waits in an all-reduce before it logs which ranks are missing. DISTCLIP_PATIENCE overrides it."""

_GRACE = 2.0
"""Seconds between the first and the last rank whose patience ends."""

_num_calls: dict[str, list[int]] = {}
"""Number of all-reduces that this rank has entered over each process group, by the name of the group."""


_MAX_KEPT = 2**16
"""Number of elements of the largest tensor that is kept until the next collective."""

_PATIENCE = 0.1
"""Seconds to wait at the exit of the process for threads of gloo."""

_used: weakref.WeakSet[ProcessGroupComm] = weakref.WeakSet()


class ProcessGroupComm:
    """Communicator over the ranks of one torch.distributed process group.

    Numbers travel on the device that the group's backend serves, whatever device the gradients are on. A rank without
    gradients and a rank with CPU-offloaded gradients therefore enter the same collective.

    Args:
        group: a process group that this rank belongs to.
        covers_holders: True for a group derived from layouts, on which every rank holds parameters, in the same
            layouts.
    """

    def __init__(self, group: dist.ProcessGroup, *, covers_holders: bool = False) -> None:
        self.group, self.covers_holders = group, covers_holders
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.device = _device(group)
        # What the last collective has sent, which threads of gloo may still hold. None after a gather of objects.
        self.sent: Tensor | None = None
        self._calls = _num_calls.setdefault(group.group_name, [0])
        # An accelerator's host does not wait in an all-reduce, and torch's own watchdog reports there. Backends for the
        # CPU other than gloo cannot wait for a limited time.
        is_gloo = self.device.type == "cpu" and "gloo" in dist.get_backend(group)
        self._log_after = patience(_LOG_AFTER) if is_gloo else None
        _used.add(self)

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over ranks. Collectives: one all-reduce (SUM)."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its maximum over ranks. Collectives: one all-reduce (MAX)."""
        self._all_reduce(tensor, dist.ReduceOp.MAX)

    def start_sum(self, tensor: Tensor) -> tuple[Callable[[], bool], Callable[[], None]]:
        """Begin a sum, see `distclip.comm.start_sum`. Collectives: one asynchronous all-reduce."""
        on_device = tensor.to(self.device)
        self._calls[0] += 1
        call = self._calls[0]
        work = dist.all_reduce(on_device, group=self.group, async_op=True)
        assert work is not None

        def wait() -> None:
            try:
                self._wait(work, call)
            except RuntimeError as error:
                raise self._lost(error) from error
            self.sent = on_device if on_device.numel() <= _MAX_KEPT else None
            if on_device is not tensor:
                tensor.copy_(on_device)

        return work.is_completed, wait

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`. Collectives: one all_gather_object."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        self.sent = None
        return values

    def _all_reduce(self, tensor: Tensor, op: Any) -> None:
        on_device = tensor.to(self.device)
        self._calls[0] += 1
        try:
            work = dist.all_reduce(on_device, op=op, group=self.group, async_op=True)
            if work is not None:
                self._wait(work, self._calls[0])
        except RuntimeError as error:
            raise self._lost(error) from error
        self.sent = on_device if on_device.numel() <= _MAX_KEPT else None
        # `to` copies only between devices, so that the result of most calls is in place already.
        if on_device is not tensor:
            tensor.copy_(on_device)

    def _lost(self, error: RuntimeError) -> PeerError:
        """Return the error for an all-reduce that has failed."""
        return PeerError(
            f"an all-reduce over {rank_list(self.ranks)} failed: {error!s:.300} A rank has ended, or has "
            "left out this call, or has made another one. Make the same calls on every rank."
        )

    def _wait(self, work: dist.Work, call: int) -> None:
        """Wait for an all-reduce. After a while, log which ranks have not entered it.

        Args:
            work: the all-reduce.
            call: 1-based index among those of the process group.
        """
        if self._log_after is None:
            work.wait()
            return
        if self._has_ended(work, self._log_after):
            return
        store = PrefixStore(f"distclip/waiting/{self.group.group_name}/{call}", _default_store())
        store.set(str(self.ranks[self.rank]), "")
        # One rank logs, once the others have had the time to write that they wait as well.
        if store.add("num_waiting", 1) == 1 and not self._has_ended(work, _GRACE):
            missing = [rank for rank in self.ranks if not store.check([str(rank)])]
            if missing:
                _log.warning(
                    "still waiting: %d of %d ranks (%s) have not entered the same all-reduce. They have ended, are "
                    "stopped or slow, or have left out this call. Look at the log of the first of them.",
                    *(len(missing), self.size, rank_list(missing)),
                )
        work.wait()

    def _has_ended(self, work: dist.Work, seconds: float) -> bool:
        """Wait for an all-reduce for some time, and return whether it has ended."""
        try:
            work.wait(timedelta(seconds=min(seconds, 1e6)))
        except RuntimeError:
            # Either the time has passed, or the all-reduce has failed.
            if work.is_completed():
                raise
            return False
        return True


def patience(default: float) -> float:
    """Return the seconds after which a waiting rank logs which ranks are missing.

    They are the environment variable DISTCLIP_PATIENCE, or the default.
    """
    return float(os.environ.get("DISTCLIP_PATIENCE", default))


@atexit.register
def await_gloo() -> None:
    """Wait until the threads of gloo hold no tensor of the last collectives.

    A thread that drops a tensor while Python shuts down aborts the process (pytorch #190489). It drops it within
    microseconds after the collective, but a process may end sooner.
    """
    end, last = time.monotonic() + _PATIENCE, [comm.sent for comm in list(_used) if comm.device.type == "cpu"]
    for sent in last:
        while sent is not None and sent._use_count() > 1 and time.monotonic() < end:  # type: ignore[attr-defined]
            time.sleep(0.001)
    # torch's own tensors of a gather of objects cannot be seen from here.
    if None in last:
        time.sleep(_PATIENCE / 5)


def _default_store() -> Store:
    return distributed_c10d._get_default_store()


def group_of_name(name: str) -> dist.ProcessGroup:
    """Return the process group of a name, which is the same on all of its ranks."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return the device of a group's collectives."""
    # Only the backend decides, never a tensor of this rank: the device must be of the same kind on every rank.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
