"""Copies that say so: what DistributedDataParallel keeps alike on the ranks of its process group."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..comm.ranks import Ranks
from .split_over import group_ranks

__all__ = ["replicated_ranks"]


def replicated_ranks(module: nn.Module) -> dict[int, Ranks]:
    """By `id`, the ranks that hold a copy of each parameter which DistributedDataParallel manages in `module`.

    A copy needs no sum. But with the group known all ranks decide from one total, also when something happened to a
    gradient of one of them after the copies were made alike.

    Args:
        module: wrapped, or with wrapped modules in it.
    """
    ranks: dict[int, Ranks] = {}
    for wrapped in module.modules():
        if isinstance(wrapped, DistributedDataParallel):
            group = group_ranks(wrapped.process_group)
            ignored = wrapped.parameters_to_ignore
            managed = (p for name, p in wrapped.module.named_parameters() if name not in ignored)
            ranks |= {id(param): group for param in managed}
    return ranks
