"""Reduce partial gradients before they are measured: those in Partial placement, which have not been summed yet.

The norm of a sum does not follow from the norms of its summands. So here, and only here, a call needs more than one
all-reduce: the partial gradients themselves are summed over their mesh axes, and the result is measured and added. The
first all-reduce has shown all ranks of the communicator that some rank has partial gradients. The ranks gather
descriptions, and every rank plans all sums from them, so that all ranks find the same errors and enter the same
collectives. A rank without such a gradient contributes zeros, and is a replica of the sum like the other ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import TypeAlias

import torch
import torch.distributed as dist

from ..comm import Comm, global_ranks
from ..comm.process_group import group_of_name
from ..comm.ranks import Ranks
from ..devices import Fact
from ..errors import LayoutError
from ..sharding.local_tensors import has_local_tensors, on_all_ranks, sum_on_all_ranks
from ..sharding.shard import PartialSum, Rows, Shard, Shards
from ..sharding.table import ShardTable
from .measure import Partials, measure
from .message import maximum
from .reduce import Totals, reduce
from .spec import NormSpec

__all__ = ["reduce_partial_grads"]


@dataclass(frozen=True, slots=True)
class _PartialGrad:
    """Description of a partial gradient that other ranks need to take part in its sum."""

    sums: tuple[PartialSum, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_replicas: float
    rows: Rows | None

    @property
    def axes(self) -> tuple[tuple[int, bool], ...]:
        """Mesh axes of its sums, ascending, each with True for a mean."""
        return tuple(sorted((one.axis, one.mean) for one in self.sums))


@dataclass(frozen=True, slots=True)
class _RankInfo:
    """Description of one rank.

    Args:
        possible: for each tensor that has any, the sums that its gradient could need.
        partial: its partial gradients, by name.
        whole: names of its other gradients, as far as their tensors are in `possible`.
    """

    possible: Mapping[str, tuple[PartialSum, ...]]
    partial: Mapping[str, _PartialGrad]
    whole: frozenset[str]

    def sum_along(self, name: str, axis: int) -> PartialSum | None:
        """Return the sum over one mesh axis that this rank can take part in, or None without such an axis."""
        # The gradient's mesh comes first, because it may differ from that of the parameter.
        own = self.partial[name].sums if name in self.partial else ()
        return next((one for one in (*own, *self.possible.get(name, ())) if one.axis == axis), None)


@dataclass(frozen=True, slots=True)
class _Block:
    """Ranks whose partial gradients add up to one shard.

    Args:
        name: name of the parameter.
        members: sums along each axis of every rank, by rank.
        grad: description of one of the gradients.
        dtype: dtype of the sum, at least float32.
    """

    name: str
    members: Mapping[int, tuple[PartialSum, ...]]
    grad: _PartialGrad
    dtype: torch.dtype

    def all_reduces(self) -> Iterator[_AllReduce]:
        """Yield every all-reduce that the block needs: one for each line of ranks along each axis."""
        for i, (axis, mean) in enumerate(self.grad.axes):
            lines = {sums[i].ranks for sums in self.members.values()}
            for ranks in lines:
                # Equal meshes may have several groups of the same ranks. Any of them will do, so all ranks take one.
                group_name = min(self.members[rank][i].group_name for rank in ranks)
                yield (axis, ranks, group_name, str(self.dtype)), self.name, mean


_AllReduce: TypeAlias = tuple[tuple[int, Ranks, str, str], str, bool]
"""(key, name, mean) of one gradient in one all-reduce. Gradients of one key (axis, ranks, group, dtype) share it."""


def reduce_partial_grads(
    totals: Totals, table: ShardTable, shards: Shards, spec: NormSpec, comm: Comm, device: torch.device
) -> Totals:
    """Add the norms of partial gradients to totals that lack them.

    Args:
        totals: of all other gradients.
        table: of this rank.
        shards: of this rank.
        spec: the norm that was measured.
        comm: all ranks concerned, all of which call this function.
        device: where the totals are.

    Returns:
        The complete totals.

    Raises:
        LayoutError: ranks of the mesh did not pass the tensor at all, or hold gradients of another shape or placement;
            on all ranks.

    Collectives: one gather of descriptions over `comm`, one all-reduce of all partial gradients of a dtype over each
    mesh axis, and one all-reduce over `comm` as in `reduce`. Host syncs: one.
    """
    more_spec = replace(spec, needs_weights=False, limits=None)
    if has_local_tensors((raw := table.gradients()).grads):
        # All summands are in this process.
        own_partial = [i for i, info in enumerate(raw.infos) if info.partial_sums]
        tensors = table.tensors if table.are_gradients else table.tensors_with_gradient()
        summed = sum_on_all_ranks(raw.where(own_partial))
        summed = on_all_ranks(summed, [tensors[i] for i in own_partial], tuple(global_ranks(comm)))
        return _add(totals, measure(summed, more_spec, device, len(totals.powers)), more_spec, comm)
    this_rank, possible = dist.get_rank(), table.possible_sums()
    partial = {
        shard.name: _PartialGrad(
            shard.partial_sums, tuple(shard.grad.shape), shard.grad.dtype, shard.num_replicas, shard.rows
        )
        for shard in map(shards.__getitem__, shards.infos.whole[2])
        if shard.partial_sums
    }
    whole = frozenset(name for name in shards.infos.names if name in possible and name not in partial)
    by_rank = dict(zip(global_ranks(comm), comm.gather_objects(_RankInfo(possible, partial, whole)), strict=True))
    blocks = _blocks(by_rank)

    # This rank's part in each sum, zeros if it has no gradient.
    own = {name: shards.grads[i] for i, name in enumerate(shards.infos.names) if name in partial}
    blocks = [block for block in blocks if this_rank in block.members]
    dtypes = {str(block.dtype): block.dtype for block in blocks}
    summands: dict[str, torch.Tensor] = {}
    for block in blocks:
        at = table.slot_of(block.name)[1]
        grad = own.get(block.name)
        summands[block.name] = torch.zeros(block.grad.shape, dtype=block.dtype, device=at) if grad is None else grad

    # All ranks sum in the same order. It goes axis by axis, because a rank that took the axes in another order would
    # add sums to summands, and then by ranks, group, dtype and name.
    steps = sorted(step for block in blocks for step in block.all_reduces() if this_rank in step[0][1])
    for (_, ranks, group_name, dtype), batch in itertools.groupby(steps, key=lambda step: step[0]):
        parts = [(name, mean) for _, name, mean in batch]
        # One all-reduce for all gradients of a mesh axis and dtype.
        flat = torch.cat([summands[name].to(dtypes[dtype]).reshape(-1) for name, _ in parts])
        buffer = torch.view_as_real(flat) if flat.is_complex() else flat
        dist.all_reduce(buffer, group=group_of_name(group_name))
        lengths = [summands[name].numel() for name, _ in parts]
        for (name, mean), piece in zip(parts, torch.split(flat, lengths), strict=True):
            summands[name] = piece.view(summands[name].shape) / (len(ranks) if mean else 1)

    # Now they can be measured like any other gradient, and added to the totals. The rows of a gradient are those of
    # any other in the block, because the axes of its sums cut no rows.
    reduced = [
        Shard(b.name, summands[b.name], b.grad.num_replicas, (), table.slot_of(b.name)[0], b.grad.rows) for b in blocks
    ]
    return _add(totals, measure(Shards.of(reduced), more_spec, device, len(totals.powers)), more_spec, comm)


def _add(totals: Totals, more: Partials, spec: NormSpec, comm: Comm) -> Totals:
    """Add the sums of reduced gradients to totals that lack them."""
    if math.isinf(spec.norm_type):
        powers = torch.maximum(totals.powers, maximum(more, spec, comm)["powers"])
    else:
        powers = totals.powers + reduce(more, spec, comm, read_facts=False).powers
    return replace(totals, powers=powers, has_partial_grads=Fact(False))


def _blocks(by_rank: Mapping[int, _RankInfo]) -> list[_Block]:
    """Find the blocks of all partial gradients.

    Args:
        by_rank: description of every rank.

    Raises:
        LayoutError: see `reduce_partial_grads`.
    """
    blocks: list[_Block] = []
    seen: set[tuple[str, int]] = set()
    for rank, info in by_rank.items():
        for name, grad in info.partial.items():
            if (name, rank) not in seen:
                block = _block_around(name, rank, grad, by_rank)
                seen.update((name, member) for member in block.members)
                blocks.append(block)
    return blocks


def _block_around(name: str, holder: int, grad: _PartialGrad, by_rank: Mapping[int, _RankInfo]) -> _Block:
    """Find the block of the partial gradient of one rank."""
    members: dict[int, tuple[PartialSum, ...]] = {}
    waiting: list[int] = [holder]
    while waiting:
        rank = waiting.pop()
        if rank in members:
            continue
        info = by_rank.get(rank)
        if info is None or name not in info.possible:
            raise LayoutError(
                f"{name} has a partial gradient on rank {holder}, and rank {rank} of the same mesh axis did not pass "
                "it. Pass every parameter on every rank, also those without a gradient."
            )
        if name in info.whole:
            raise _contradiction(name, holder, "a partial gradient", rank, "a gradient that needs no sum")
        sums = [one for axis, _ in grad.axes if (one := info.sum_along(name, axis)) is not None]
        if len(sums) < len(grad.axes):
            raise _contradiction(name, holder, "one mesh", rank, "another")
        members[rank] = tuple(sums)
        waiting += sorted({other for one in sums for other in one.ranks} - members.keys())
    # All ranks along a line must have the same line, because otherwise their all-reduces would not match.
    for rank, own in members.items():
        for i, one in enumerate(own):
            for other in one.ranks:
                if members[other][i].ranks != one.ranks:
                    raise _contradiction(name, rank, f"the mesh axis {one.ranks}", other, f"{members[other][i].ranks}")
    grads = {rank: by_rank[rank].partial[name] for rank in sorted(members) if name in by_rank[rank].partial}
    for rank, summand in grads.items():
        if summand.axes != grad.axes:
            raise _contradiction(name, holder, "sums over some mesh axes", rank, "sums over others")
        if summand.shape != grad.shape:
            raise _contradiction(
                name, holder, f"a summand of shape {grad.shape}", rank, f"one of shape {summand.shape}"
            )
    dtype = fold(torch.promote_types, (summand.dtype for summand in grads.values()), torch.float32)
    return _Block(name, members, grad, dtype)


def _contradiction(name: str, one: int, has: str, other: int, has_instead: str) -> LayoutError:
    return LayoutError(
        f"{name} has {has} on rank {one}, and {has_instead} on rank {other}, so that they do not add up. Pass the same "
        "parameters in the same order on every rank, and gradients with the placements of one backward."
    )
