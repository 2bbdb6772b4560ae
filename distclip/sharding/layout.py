"""Define `Layout`, the distribution of one parameter over ranks, and count the replicas of a shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..comm.ranks import Axis, Ranks
from .replicas import ReplicaGroup

__all__ = ["Layout", "num_reached", "num_replicas", "product"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Distribution of one parameter over ranks, as far as the parameter or its owner describes it.

    Args:
        groups: ranks of each mesh or process group that the parameter spans. Empty for a plain tensor.
        num_pieces: number of different shards within those groups together.
        split: for each axis of `split_over=`, True if the ranks along it hold different tensors under this name.
        cut: for each axis of `split_over=`, True if these tensors are shards of one parameter. Otherwise they are
            different parameters.
        counted: False for a replica that its owner excludes from norms (Megatron's `shared`).
        may_be_partial: True if its gradient can be a partial gradient, which still needs a sum over ranks.
        is_averaged: True if every rank of `groups` has the whole gradient, which DDP has averaged over them.
        replicas: ranks that hold the same shard as this rank, one group for each source that describes them.
    """

    groups: tuple[Ranks, ...] = ()
    num_pieces: int = 1
    split: tuple[bool, ...] = ()
    cut: tuple[bool, ...] = ()
    counted: bool = True
    may_be_partial: bool = False
    is_averaged: bool = False
    replicas: tuple[ReplicaGroup, ...] = ()

    @property
    def num_members(self) -> int:
        """Number of ranks that the parameter spans: those of the product of its groups."""
        return _spanned(self.groups)[1]

    @property
    def members(self) -> frozenset[int]:
        """Global ranks that the parameter spans."""
        return _spanned(self.groups)[0]


_spanned_by: dict[tuple[int, ...], tuple[tuple[Ranks, ...], frozenset[int], int]] = {}


def _spanned(groups: tuple[Ranks, ...]) -> tuple[frozenset[int], int]:
    """Return the ranks of some groups, and the number of ranks of their product."""
    # Thousands of parameters share one mesh, whose ranks can be all of a large job. Comparing tuples reads all of them.
    key = tuple(map(id, groups))
    if (entry := _spanned_by.get(key)) is None:
        # A group within another one adds no ranks. Any two other groups have only this rank in common.
        distinct = set(map(frozenset, groups))
        count = math.prod(len(ranks) for ranks in distinct if not any(ranks < other for other in distinct))
        while len(_spanned_by) >= _MAX_ENTRIES:
            _spanned_by.pop(next(iter(_spanned_by)), None)
        # The entry keeps the groups alive, so that no other objects get their ids.
        entry = _spanned_by[key] = groups, frozenset[int]().union(*groups), count
    return entry[1], entry[2]


_MAX_ENTRIES = 512


def product(one: Layout, two: Layout) -> Layout:
    """Combine two layouts of one tensor over different axes, such as a DTensor with an annotation.

    >>> product(Layout(((0, 1),), num_pieces=2), Layout(((0, 2),), num_pieces=2)).num_pieces
    4
    """
    return replace(
        one,
        groups=one.groups + two.groups,
        num_pieces=one.num_pieces * two.num_pieces,
        may_be_partial=one.may_be_partial or two.may_be_partial,
        replicas=one.replicas + two.replicas,
    )


def num_reached(layout: Layout, axes: Sequence[Axis]) -> float:
    """Return the number of ranks that the groups of a layout and the axes that split it describe together.

    >>> num_reached(Layout(((0, 1),), num_pieces=2, split=(True,)), [Axis((0, 2), "pp")])
    4.0
    """
    count, members = float(layout.num_members), layout.members
    for axis, split in zip(axes, layout.split, strict=True):
        if split:
            count *= len(axis.ranks) / max(1, len(members.intersection(axis.ranks)))
    return count


def num_replicas(world_size: int, layout: Layout, axes: Sequence[Axis], num_meshes: int | None = None) -> float:
    r"""Return the number of ranks of the communicator that hold the same shard as this one.

    .. math:: replicas = \frac{N}{pieces \cdot \prod_{a\ split} |a| / |a \cap members|}

    A parameter counts as replicated over all ranks that neither its placements nor `split_over=` describe, unless the
    ranks have exchanged the number of meshes that hold it.

    Args:
        world_size: N, the number of ranks in the communicator.
        layout: layout of the parameter.
        axes: axes of `split_over=`.
        num_meshes: number of disjoint meshes, each of which holds the whole parameter. None if the layout and the axes
            reach every rank.

    >>> stage = Axis((0, 2), "pp")
    >>> num_replicas(4, Layout(groups=((0, 1),), num_pieces=2, split=(True,)), [stage])  # FSDP2 inside of a stage
    1.0
    >>> num_replicas(4, Layout(split=(True,)), [stage])  # a plain tensor of a stage, replicated over two ranks
    2.0
    """
    if not layout.counted:
        return math.inf  # Divided by infinity, its power sum contributes nothing, but a NaN in it is still detected.
    if num_meshes is not None:
        return layout.num_members / layout.num_pieces * num_meshes
    count = world_size / layout.num_pieces
    members = layout.members
    for axis, split in zip(axes, layout.split, strict=True):
        if split:
            # `num_pieces` already includes the part of an axis that is inside the parameter's mesh.
            count *= max(1, len(members.intersection(axis.ranks))) / len(axis.ranks)
    return count
