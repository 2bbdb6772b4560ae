"""Communicate over torch.distributed."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from ..errors import PeerError
from .ranks import rank_list

__all__ = ["ProcessGroupComm", "group_of_name"]


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
        work = dist.all_reduce(on_device, group=self.group, async_op=True)
        assert work is not None

        def wait() -> None:
            try:
                work.wait()
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
        try:
            dist.all_reduce(on_device, op=op, group=self.group)
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


@atexit.register
def await_gloo() -> None:
    """Wait until the threads of gloo hold no tensor of the last collectives.

    A thread that drops a tensor while Python shuts down aborts the process (pytorch #190489). It drops it within
    microseconds after the collective, but a process may end sooner.
    """
    end = time.monotonic() + _PATIENCE
    for comm in list(_used):
        if comm.device.type != "cpu":
            continue
        # torch's own tensors of a gather of objects cannot be seen from here.
        if comm.sent is None and time.monotonic() < end:
            time.sleep(_PATIENCE / 5)
        while comm.sent is not None and comm.sent._use_count() > 1 and time.monotonic() < end:  # type: ignore[attr-defined]
            time.sleep(0.001)


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
