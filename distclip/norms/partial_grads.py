"""Reduce partial gradients before they are measured: those in Partial placement, which have not been summed yet.

The norm of a sum does not follow from the norms of its summands. So here, and only here, a call needs more than one
all-reduce: the partial gradients themselves are summed over their mesh axis, and the result is measured and added.
All ranks of the communicator have read in the first all-reduce that this happens. A rank without such a gradient
contributes zeros, and is a replica of the sum like the other ranks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ..comm import Comm
from ..comm.ranks import Ranks
from ..devices import Fact
from ..errors import LayoutError
from ..sharding.shard import Shard, Shards
from ..sharding.table import ShardTable
from .measure import measure
from .reduce import Totals, reduce
from .spec import NormSpec

__all__ = ["reduce_partial_grads"]


@dataclass(frozen=True, slots=True)
class _PartialGrad:
    """Description of a partial gradient that other ranks need to take part in its sum."""

    name: str
    ranks: Ranks
    axis: int
    mean: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of the sum, at least float32."""
        return torch.promote_types(self.dtype, torch.float32)


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
        LayoutError: a rank of the mesh axis did not pass the tensor at all; on all ranks.

    Collectives: one gather of descriptions over `comm`, one all-reduce of all partial gradients of a dtype over each
    mesh axis, and one all-reduce over `comm` as in `reduce`. Host syncs: one.
    """
    this_rank = dist.get_rank()
    local = [
        _PartialGrad(shard.name, pending.ranks, pending.axis, pending.mean, tuple(shard.grad.shape), shard.grad.dtype)
        for shard in shards
        for pending in shard.partial_sums
    ]
    gathered = comm.gather_objects((this_rank, set(table.names), local))
    _check_all_passed(gathered)

    # Every sum that this rank takes part in, in an order that all ranks share: axis by axis, because a rank that took
    # the axes in another order would add sums to summands; then by group, dtype and name.
    sums = {
        (partial.axis, partial.ranks, str(partial.sum_dtype), partial.name): partial
        for _, _, partials in gathered
        for partial in partials
        if this_rank in partial.ranks
    }
    groups = {s.ranks: s.group for partial in sums.values() for s in table.possible_sums(partial.name)}
    groups |= {s.ranks: s.group for shard in shards for s in shard.partial_sums}
    current = {shard.name: shard for shard in shards}
    reduced: dict[str, Shard] = {}
    for (_, ranks, _), batch in itertools.groupby(sorted(sums), key=lambda key: key[:3]):
        partials = [sums[key] for key in batch]
        for partial in partials:
            name = partial.name
            reduced[name] = current.get(name) or table.zeros_for(name, partial.shape, partial.dtype)
        # One all-reduce for all gradients of a mesh axis and dtype.
        flat = torch.cat([reduced[partial.name].grad.to(partial.sum_dtype).reshape(-1) for partial in partials])
        dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=groups[ranks])
        lengths = [math.prod(partial.shape) for partial in partials]
        for partial, piece in zip(partials, torch.split(flat, lengths), strict=True):
            grad = piece.view(partial.shape) / (len(ranks) if partial.mean else 1)
            reduced[partial.name] = current[partial.name] = replace(reduced[partial.name], grad=grad, partial_sums=())

    # Now they can be measured like any other gradient, and added to the totals.
    more_spec = replace(spec, needs_weights=False, limits=None)
    more = reduce(measure(reduced.values(), more_spec, device, len(totals.powers)), more_spec, comm, read_facts=False)
    combine = torch.maximum if math.isinf(spec.norm_type) else torch.add
    return replace(totals, powers=combine(totals.powers, more.powers), has_partial_grads=Fact(False))


def _check_all_passed(gathered: list[tuple[int, set[str], list[_PartialGrad]]]) -> None:
    """Raise if a rank did not pass a tensor that is partial on another rank of its mesh axis."""
    names_of = {rank: names for rank, names, _ in gathered}
    for holder, _, partials in gathered:
        for partial in partials:
            for rank in partial.ranks:
                if partial.name not in names_of.get(rank, set()):
                    raise LayoutError(
                        f"{partial.name} has a partial gradient on rank {holder}, and rank {rank} of the same mesh "
                        "axis did not pass it. Pass every parameter on every rank, also those without a gradient."
                    )
