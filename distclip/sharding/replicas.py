"""Define `ReplicaGroup`, the ranks that hold one and the same shard, and weights under which equal replicas cancel."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..comm.ranks import Axis, Ranks, is_tensor_axis

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "ReplicaGroup",
    "assumed_groups",
    "assumed_without_axes",
    "mesh_replicas",
    "replica_group",
    "replica_weight",
]

_MAX_WEIGHTS = 1 << 20
"""Bound on (number of ranks) · (largest weight), which keeps a weighted sum of 32-bit numbers below 2^51."""


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """Ranks that hold one and the same shard, this rank among them.

    Args:
        ranks: global ranks, in an order that all of them share.
        is_exact: True if the replicas of a gradient have the same bits, because one collective has written all of them.
            False if every rank has computed its replica itself, or if the tensors are only assumed to be replicas.
    """

    ranks: Ranks
    is_exact: bool = True


def replica_group(ranks: Ranks, is_exact: bool = True) -> tuple[ReplicaGroup, ...]:
    """Return the group of these ranks, or nothing if there is a single rank."""
    return (ReplicaGroup(ranks, is_exact),) if len(ranks) > 1 else ()


_replicas_of_mesh: weakref.WeakKeyDictionary[DeviceMesh, dict[tuple[bool, ...], tuple[ReplicaGroup, ...]]] = (
    weakref.WeakKeyDictionary()
)


def mesh_replicas(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[ReplicaGroup, ...]:
    """Return the ranks of a mesh that hold the same shard as this rank: those along its replicated axes.

    Args:
        mesh: contains this rank.
        placements: one for each axis of the mesh.
    """
    is_replicated = tuple(placement.is_replicate() for placement in placements)
    # Thousands of parameters share one mesh, and reading its ranks costs several tensor operators.
    known = _replicas_of_mesh.setdefault(mesh, {})
    if is_replicated not in known:
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "the layout of a tensor is read on the ranks of its mesh"
        index = tuple(slice(None) if same else at for same, at in zip(is_replicated, coordinate, strict=True))
        names = mesh.mesh_dim_names or ("",) * mesh.ndim
        # Along a tensor-parallel axis each rank computes its replica itself.
        computed = any(same and mesh.size(i) > 1 and is_tensor_axis(names[i]) for i, same in enumerate(is_replicated))
        known[is_replicated] = replica_group(tuple(mesh.mesh[index].reshape(-1).tolist()), not computed)
    return known[is_replicated]


def assumed_groups(
    axes_by_rank: Mapping[int, tuple[Axis, ...]], rank: int
) -> Mapping[tuple[bool, ...], tuple[ReplicaGroup, ...]]:
    """Return the ranks that are assumed to hold the same plain tensors as this rank.

    A plain tensor has no information about its replicas. It counts as replicated over all ranks that no axis of
    `split_over=` separates.

    Args:
        axes_by_rank: axes of `split_over=` that every rank of the communicator passed, by global rank.
        rank: global rank of this process.

    Returns:
        The group for each possible value of `Layout.split`. A value for which the group cannot be determined is
        missing.

    >>> axes = {0: (Axis((0, 2)),), 1: (Axis((1, 3)),), 2: (Axis((0, 2)),), 3: (Axis((1, 3)),)}
    >>> [(split, group.ranks) for split, (group,) in assumed_groups(axes, 2).items()]
    [((False,), (0, 1, 2, 3)), ((True,), (2, 3))]
    """
    groups: dict[tuple[bool, ...], tuple[ReplicaGroup, ...]] = {}
    num_axes = len(axes_by_rank[rank])
    # Ranks with different axes are refused elsewhere.
    if any(len(axes) != num_axes for axes in axes_by_rank.values()):
        return groups
    coords = {
        one: tuple(axis.ranks.index(one) for axis in axes)
        for one, axes in axes_by_rank.items()
        if all(one in axis.ranks for axis in axes)
    }
    for number in range(1 << num_axes):
        split = tuple(bool(number >> i & 1) for i in range(num_axes))
        same = (one for one, at in coords.items() if _along(at, split) == _along(coords[rank], split))
        groups[split] = replica_group(tuple(sorted(same)), is_exact=False)
    return groups


@functools.lru_cache(maxsize=64)
def assumed_without_axes(ranks: Sequence[int], rank: int) -> Mapping[tuple[bool, ...], tuple[ReplicaGroup, ...]]:
    """Return `assumed_groups` of ranks that passed no axes: all of them hold the same plain tensors.

    Args:
        ranks: of the communicator, global.
        rank: global rank of this process.
    """
    return assumed_groups(dict.fromkeys(ranks, ()), rank)


def _along(coords: tuple[int, ...], split: tuple[bool, ...]) -> tuple[int, ...]:
    return tuple(coord for coord, is_split in zip(coords, split, strict=True) if is_split)


def replica_weight(index: int, num_replicas: int, world_size: int) -> int:
    """Return the weight of one replica's checksum.

    The weights of all replicas add up to 0, so the weighted sum of equal checksums is 0. All weights but the first are
    positive, so the weighted sum of two different checksums is never 0, whichever ranks have them: the ranks of one
    node and those of another, for example. All weights differ, so equal and opposite changes of two replicas do not
    cancel.

    Args:
        index: of the replica in its group.
        num_replicas: number of ranks in the group.
        world_size: number of ranks that add up weighted checksums. Above 1,024 ranks weights repeat.

    >>> [replica_weight(i, 2, 2) for i in range(2)], [replica_weight(i, 5, 5) for i in range(5)]
    ([-1, 1], [-10, 1, 2, 3, 4])
    """
    # With many ranks the weights must stay small, so that all partial sums stay exact.
    most = max(1, _MAX_WEIGHTS // world_size - 1)
    if index > 0:
        return 1 + (index - 1) % most
    num_rounds, rest = divmod(num_replicas - 1, most)
    return -(num_rounds * most * (most + 1) + rest * (rest + 1)) // 2
