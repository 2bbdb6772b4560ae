"""Communicate over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from ..errors import PeerError
from .ranks import rank_list

__all__ = ["ProcessGroupComm", "group_of_name"]


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
            if on_device is not tensor:
                tensor.copy_(on_device)

        return work.is_completed, wait

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`. Collectives: one all_gather_object."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _all_reduce(self, tensor: Tensor, op: Any) -> None:
        on_device = tensor.to(self.device)
        try:
            dist.all_reduce(on_device, op=op, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        # `to` copies only between devices, so that the result of most calls is in place already.
        if on_device is not tensor:
            tensor.copy_(on_device)

    def _lost(self, error: RuntimeError) -> PeerError:
        """Return the error for an all-reduce that has failed."""
        return PeerError(
            f"an all-reduce over {rank_list(self.ranks)} failed: {error!s:.300} A rank has ended, or has "
            "left out this call, or has made another one. Make the same calls on every rank."
        )


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
