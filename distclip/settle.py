"""Gradients that are still summands (Partial placements): sum them, then measure.

The norm of a sum does not follow from the norms of its summands, so here, and only here, a call needs more than one
all-reduce: the summands themselves travel over their own mesh axis and the result is added up once more.
All ranks of the communicator have read from the first reduction that it is so; a rank that has no such gradient adds
zeros, and holds a copy of the sum like the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Comm
from .errors import LayoutError
from .measure import measure
from .reduce import Totals, reduce
from .shards import Ranks, Shard
from .sources import Plan

__all__ = ["settle"]


@dataclass(frozen=True, slots=True)
class _Summand:
    """One rank's word that a gradient of it waits for a sum."""

    name: str
    ranks: Ranks
    shape: tuple[int, ...]
    dtype: torch.dtype


_Told: TypeAlias = tuple[int, set[str], list[_Summand]]
"""A rank, the names of the tensors it passed, and its summands."""


def settle(totals: Totals, plan: Plan, shards: list[Shard], comm: Comm, device: torch.device) -> Totals:
    """Add the gradients that are summands to totals that lack them.

    Args:
        totals: of everything else.
        plan: of this rank.
        shards: of this rank.
        comm: everybody concerned; all of them call this.
        device: of the result.

    Raises:
        LayoutError: a rank of the mesh axis did not pass the tensor at all; raised by all.

    Collectives: one gather of descriptions and one all-reduce of two numbers over `comm`, one all-reduce of each such
    gradient over its mesh axis. Host syncs: one.
    """
    here = dist.get_rank()
    by_name = {shard.name: shard for shard in shards}
    own = [_Summand(s.name, p.ranks, tuple(s.grad.shape), s.grad.dtype) for s in shards for p in s.pending]
    told: list[_Told] = comm.gather_objects((here, {name for name, _, _ in plan.entries}, own))
    _check(told)
    wanted = {(s.name, s.ranks): s for _, _, summands in told for s in summands if here in s.ranks}
    settled: dict[str, Shard] = {}
    for (name, ranks), summand in sorted(wanted.items(), key=lambda item: item[0]):
        shard = settled.get(name) or by_name.get(name) or plan.absent(name, summand.shape, summand.dtype, comm.size)
        pending = next(p for p in (*by_name.get(name, shard).pending, *plan.sums(name)) if p.ranks == ranks)
        grad = _widened(shard.grad)
        dist.all_reduce(torch.view_as_real(grad) if grad.is_complex() else grad, group=pending.group)
        settled[name] = replace(shard, grad=grad / len(ranks) if pending.mean else grad, pending=())
    more = reduce(measure(settled.values(), totals.norm_type, device), totals.norm_type, comm)
    join = torch.maximum if math.isinf(totals.norm_type) else torch.add
    return replace(totals, value=join(totals.value, more.value))


def _check(told: list[_Told]) -> None:
    known = {rank: names for rank, names, _ in told}
    for holder, _, summands in told:
        for summand in summands:
            for rank in summand.ranks:
                if summand.name not in known.get(rank, set()):
                    raise LayoutError(
                        f"{summand.name} holds summands of a gradient (Partial) on rank {holder}, and rank {rank} of "
                        "the same mesh axis did not pass it. Pass every parameter on every rank, also without gradient."
                    )


def _widened(grad: Tensor) -> Tensor:
    """A copy in at least float32, to add up in."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
