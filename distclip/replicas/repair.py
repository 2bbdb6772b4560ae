"""Overwrite replicas that differ by those of the majority."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..comm import Comm, global_ranks
from .compare import Kind, ReplicaDifference

__all__ = ["repair_"]

_CHUNK = 1 << 20
"""Number of words that are sent at a time: 8 MB."""


@torch.no_grad()
def repair_(differences: Sequence[ReplicaDifference], find: Callable[[Kind, str], Tensor], comm: Comm) -> None:
    """Overwrite the replicas of ranks in the minority.

    Args:
        differences: differences with a majority; the same on every rank.
        find: returns this rank's replica of a name.
        comm: all ranks concerned, all of which call this function.

    Collectives: for each difference one all-reduce over `comm` for every 4 MB of a replica. Host syncs: the copies to
    and from the host.
    """
    own = global_ranks(comm)[comm.rank]
    for difference in differences:
        source = next(rank for rank in difference.group if rank not in difference.ranks)
        words = torch.zeros(-(-difference.num_bytes // 4), dtype=torch.int32)
        tensor = (
            find(difference.kind, difference.names[difference.group.index(own)]) if own in difference.group else None
        )
        if tensor is not None and own == source:
            words.view(torch.uint8)[: difference.num_bytes] = _bytes(tensor)
        # A communicator has no broadcast. A sum of float64 numbers, to which all other ranks add 0, transfers the bits
        # of any dtype exactly.
        for piece in torch.split(words, _CHUNK):
            numbers = piece.to(torch.float64)
            comm.sum_(numbers)
            piece.copy_(numbers)
        if tensor is not None and own in difference.ranks:
            raw = words.view(torch.uint8)[: difference.num_bytes].clone().view(tensor.dtype)
            tensor.copy_(raw.view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
