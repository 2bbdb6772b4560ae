"""torch.distributed as a communicator."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ProcessGroupComm"]


class ProcessGroupComm:
    """The ranks of one torch.distributed process group.

    Numbers travel on the device that the group's backend serves, whatever device the gradients are on, so that a
    rank without gradients and a rank with CPU-offloaded ones enter the same collective.

    Args:
        group: a process group that this rank belongs to.
        agreed: it was derived from meshes, so that every rank of it holds parameters, and in the same layouts.
    """

    def __init__(self, group: dist.ProcessGroup, *, agreed: bool = False) -> None:
        self.group, self.agreed = group, agreed
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.device = _device(group)

    def sum_(self, tensor: Tensor) -> None:
        """One all-reduce (SUM)."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> None:
        """One all-reduce (MAX)."""
        self._all_reduce(tensor, dist.ReduceOp.MAX)

    def gather_objects(self, value: Any) -> list[Any]:
        """One all_gather_object."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _all_reduce(self, tensor: Tensor, op: Any) -> None:
        travelling = tensor.to(self.device)
        dist.all_reduce(travelling, op=op, group=self.group)
        if travelling is not tensor:
            tensor.copy_(travelling)


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where a group's collectives run: a fact of the group, so the same on all of its ranks."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None or dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(kind.type, torch.accelerator.current_device_index())
