"""Gradients that are still summands (Partial placements): sum them, then measure.

The norm of a sum does not follow from the norms of its summands, so here, and only here, a call needs more than one
all-reduce: the summands themselves travel over their own mesh axis and the result is added up once more.
All ranks of the communicator have read from the first reduction that it is so; a rank that has no such gradient adds
zeros, and holds a copy of the sum like the others.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.distributed as dist

from ..comm import Comm
from ..comm.ranks import Ranks
from ..errors import LayoutError
from ..sharding import Plan
from ..sharding.shard import Shard, Shards
from .measure import measure
from .reduce import Totals, reduce

__all__ = ["settle"]


@dataclass(frozen=True, slots=True)
class _Summand:
    """One rank's word that a gradient of it waits for a sum."""

    name: str
    ranks: Ranks
    axis: int
    mean: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


_Told: TypeAlias = tuple[int, set[str], list[_Summand]]
"""A rank, the names of the tensors it passed, and its summands."""


def settle(totals: Totals, plan: Plan, shards: Shards, comm: Comm, device: torch.device) -> Totals:
    """Add the gradients that are summands to totals that lack them.

    Args:
        totals: of everything else.
        plan: of this rank.
        shards: of this rank.
        comm: everybody concerned; all of them call this.
        device: of the result.

    Raises:
        LayoutError: a rank of the mesh axis did not pass the tensor at all; raised by all.

    Collectives: one gather of descriptions and one all-reduce of slots + 1 numbers over `comm`, one all-reduce of all
    such gradients of a dtype over each mesh axis. Host syncs: one.
    """
    here = dist.get_rank()
    waiting = [(shard, pending) for shard in shards for pending in shard.pending]
    own = [_Summand(s.name, p.ranks, p.axis, p.mean, tuple(s.grad.shape), s.grad.dtype) for s, p in waiting]
    told: list[_Told] = comm.gather_objects((here, set(plan.arrangement.names), own))
    _check(told)
    wanted = {
        (s.axis, s.ranks, str(_wide(s.dtype)), s.name): s
        for _, _, summands in told
        for s in summands
        if here in s.ranks
    }
    current = {shard.name: shard for shard in shards}
    groups = {p.ranks: p.group for s in wanted.values() for p in plan.sums(s.name)}
    groups |= {pending.ranks: pending.group for _, pending in waiting}
    settled: dict[str, Shard] = {}
    # The same order on every rank, axis by axis, and all of one axis and dtype at once.
    for (_, ranks, _), batch in itertools.groupby(sorted(wanted), key=lambda key: key[:3]):
        summands = [wanted[key] for key in batch]
        dtype = _wide(summands[0].dtype)
        for s in summands:
            settled[s.name] = current.get(s.name) or plan.absent(s.name, s.shape, s.dtype, comm.size)
        flat = torch.cat([settled[s.name].grad.to(dtype).reshape(-1) for s in summands])
        dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=groups[ranks])
        for s, total in zip(summands, torch.split(flat, [math.prod(s.shape) for s in summands]), strict=True):
            grad = total.view(s.shape) / (len(ranks) if s.mean else 1)
            settled[s.name] = current[s.name] = replace(settled[s.name], grad=grad, pending=())
    slots = len(totals.value)
    more = reduce(measure(settled.values(), totals.norm_type, device, slots=slots), totals.norm_type, comm)
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to add up in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
