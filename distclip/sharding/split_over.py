"""Resolve `split_over=`: the axes along which ranks hold different parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..comm import Comm, missing_members
from ..comm.ranks import Axis, Grid, Ranks
from ..errors import ArgumentError, LayoutError

__all__ = ["SplitOver", "axis_ranks", "group_ranks", "mesh_ranks", "name_from_description", "split_axes"]

_One: TypeAlias = DeviceMesh | dist.ProcessGroup | Comm
SplitOver: TypeAlias = _One | Iterable[_One] | Mapping[str, _One] | None
"""A DeviceMesh (all of its axes), a ProcessGroup, a Comm such as MPIComm, several of these, or {name: one of them}."""


def split_axes(split_over: SplitOver, comm: Comm | None = None) -> tuple[Axis, ...]:
    """List the axes of `split_over=`.

    Args:
        split_over: a DeviceMesh (usually a slice: mesh["pp"]), a ProcessGroup, a `Comm` with global ranks (an MPIComm),
            an iterable of these, or a mapping from axis names. Without a mapping, names come from the mesh, or from the
            description of the group.
        comm: communicator of the same call.

    Returns:
        One axis per mesh axis or group, through this rank.

    Raises:
        ArgumentError: an element has another type, does not contain this rank, or is a `Comm` although `comm` is None.
    """
    if split_over is None:
        return ()
    # Read once, because an iterable may be a generator.
    pairs = list(_named(split_over))
    if comm is None and any(_is_comm(one) for _, one in pairs):
        raise ArgumentError(
            "split_over= contains a communicator such as MPIComm, but comm= is not given, so that each rank would "
            "clip by a norm of its local gradients only. Pass comm=MPIComm(), or another communicator over all ranks "
            "that hold parameters."
        )
    return tuple(axis for name, one in pairs for axis in _axes(one, name))


_ranks_of_mesh: weakref.WeakKeyDictionary[DeviceMesh, Ranks] = weakref.WeakKeyDictionary()


def mesh_ranks(mesh: DeviceMesh) -> Ranks:
    """Return all global ranks of a mesh.

    Raises:
        LayoutError: this rank is not one of them.
    """
    # Thousands of parameters share one mesh, and reading its ranks costs several tensor operators.
    if (ranks := _ranks_of_mesh.get(mesh)) is not None:
        return ranks
    ranks = tuple(mesh.mesh.flatten().tolist())
    if mesh.get_coordinate() is None:
        raise LayoutError(
            f"{mesh} holds ranks {list(ranks)} and not rank {dist.get_rank()}, on which it was passed. "
            "Pass each rank a mesh that contains it."
        )
    _ranks_of_mesh[mesh] = ranks
    return ranks


_ranks_of_axes: weakref.WeakKeyDictionary[DeviceMesh, tuple[Ranks, ...]] = weakref.WeakKeyDictionary()


def axis_ranks(mesh: DeviceMesh) -> tuple[Ranks, ...]:
    """Return the global ranks along each axis of a mesh, through this rank and in the order of the mesh.

    Raises:
        LayoutError: this rank is not in the mesh.
    """
    if (ranks := _ranks_of_axes.get(mesh)) is not None:
        return ranks
    mesh_ranks(mesh)  # Raises for a mesh without this rank.
    here: Sequence[int] = mesh.get_coordinate() or ()
    # The ranks of the groups cannot be used, because torch sorts them, and shards follow the order of the mesh.
    lines = (tuple(slice(None) if i == axis else at for i, at in enumerate(here)) for axis in range(mesh.ndim))
    ranks = tuple(tuple(mesh.mesh[line].tolist()) for line in lines)
    _ranks_of_axes[mesh] = ranks
    return ranks


_grids: weakref.WeakKeyDictionary[DeviceMesh, Grid] = weakref.WeakKeyDictionary()


def _root_grid(mesh: DeviceMesh) -> Grid:
    """Return the ranks of the mesh that a mesh was sliced from."""
    root = mesh._get_root_mesh()
    if (grid := _grids.get(root)) is None:
        grid = _grids[root] = Grid(tuple(root.mesh.shape), tuple(root.mesh.flatten().tolist()))
    return grid


def group_ranks(group: Any) -> Ranks:
    """Return all global ranks of a process group.

    Raises:
        LayoutError: this rank is not one of them.
    """
    # Ranks outside of a new group get a placeholder from torch that is not a ProcessGroup.
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise LayoutError(
            f"{group!r} is a process group that does not contain rank {dist.get_rank()}, on which it was passed. "
            "Pass each rank a group that contains it."
        )
    return tuple(dist.get_process_group_ranks(group))


_NOT_SEVERAL = (DeviceMesh, dist.ProcessGroup, str, bytes)


def _named(split_over: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(split_over, Mapping):
        yield from ((str(name), one) for name, one in split_over.items())
    elif isinstance(split_over, _NOT_SEVERAL) or not isinstance(split_over, Iterable | None):
        yield None, split_over
    elif split_over is not None:
        yield from ((None, one) for one in split_over)


def _axes(one: Any, name: str | None) -> Iterator[Axis]:
    """Yield the axes of one element of `split_over=`."""
    try:
        if isinstance(one, DeviceMesh):
            ranks_of, grid = axis_ranks(one), _root_grid(one)
            for i, dim_name in enumerate(one.mesh_dim_names or (None,) * one.ndim):
                yield Axis(ranks_of[i], name or dim_name, one.get_group(i).group_name, grid)
        elif isinstance(one, dist.ProcessGroup) or one == dist.GroupMember.NON_GROUP_MEMBER:
            yield Axis(group_ranks(one), name or name_from_description(one), one.group_name)
        elif _is_comm(one) and one.ranks is not None:
            ranks = tuple(one.ranks)
            # A `Comm` has no name that its ranks share, but no two communicators of one call have the same ranks.
            yield Axis(ranks, name, f"comm:{','.join(map(str, ranks))}")
        else:
            raise ArgumentError(
                f"split_over={one!r:.120}: expected a DeviceMesh, a ProcessGroup, an MPIComm (or another Comm with "
                "global ranks), several of them, or a mapping from their names. "
                'Pass split_over=mesh["pp"] or split_over={"pp": pp_group}.'
            )
    except LayoutError as error:
        raise ArgumentError(f"split_over=: {error}") from None


def _is_comm(one: Any) -> bool:
    """Return whether a caller's object is a communicator."""
    return not missing_members(one)


def name_from_description(group: Any) -> str | None:
    """Return the axis name in a group's description, if it has one."""
    # "mesh_pp" by DeviceMesh, "TENSOR_MODEL_PARALLEL_GROUP" by Megatron.
    text = (group.group_desc or "").removeprefix("mesh_").removesuffix("_GROUP").lower()
    return None if text in ("", "undefined", "default", "default_pg") else text
