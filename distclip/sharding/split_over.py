"""`split_over=`: the axes along which ranks hold different parameters, and what Megatron's tags say along them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm import Comm, missing_members
from ..comm.ranks import Axis, Ranks
from ..errors import ArgumentError, LayoutError

__all__ = ["SplitOver", "cut_along", "group_ranks", "mesh_ranks", "split_axes", "split_of"]

_One: TypeAlias = DeviceMesh | dist.ProcessGroup | Comm
SplitOver: TypeAlias = _One | Iterable[_One] | Mapping[str, _One] | None
"""A DeviceMesh (every axis of it), a ProcessGroup, a Comm such as MPIComm, several of them, or {name: one of them}."""


def split_axes(split_over: SplitOver, comm: Comm | None = None) -> tuple[Axis, ...]:
    """The axes that `split_over=` names.

    Args:
        split_over: a DeviceMesh (usually a slice: mesh["pp"]), a ProcessGroup, an MPIComm, an iterable of them, or a
            mapping from the axis' name. Names are taken from the mesh, and from a group's description where it has one.
        comm: of the same call.

    Returns:
        One axis per mesh axis or group, through this rank.

    Raises:
        ArgumentError: it is none of these, does not contain this rank, or is MPI's where `comm` is not given.
    """
    named = list(_named(split_over))
    if comm is None and any(_is_comm(one) for _, one in named):
        raise ArgumentError(
            "split_over= contains a communicator such as MPIComm, but comm= is not given, so that each rank would "
            "clip by a norm of its local gradients only. Pass comm=MPIComm(), or another communicator over all ranks "
            "that hold parameters."
        )
    return tuple(axis for name, one in named for axis in _axes(one, name))


def split_of(tensor: Tensor, axes: tuple[Axis, ...], tags_in_use: frozenset[str]) -> tuple[bool, ...]:
    """Whether each axis of `split_over=` holds different parameters for this plain tensor.

    Without tags every axis does. Megatron's tags are finer: on a tensor-parallel axis only what carries
    `tensor_model_parallel=True` is split and everything else is a copy; on an expert axis only what carries
    `allreduce=False`. An axis without a name is what the tags in use speak of; any other (pp) splits all.

    Args:
        tensor: a plain parameter.
        axes: of `split_over=`.
        tags_in_use: which of the two attributes any parameter of the call carries.
    """
    return tuple(_splits(axis, tensor, tags_in_use) for axis in axes)


@functools.lru_cache(maxsize=1024)
def mesh_ranks(mesh: DeviceMesh) -> Ranks:
    """All global ranks of a mesh.

    Raises:
        LayoutError: this rank is not one of them.
    """
    ranks = tuple(mesh.mesh.flatten().tolist())
    if mesh.get_coordinate() is None:
        raise LayoutError(
            f"{mesh} holds ranks {list(ranks)} and not rank {dist.get_rank()}, on which it was passed. "
            "Pass each rank the mesh that it is part of."
        )
    return ranks


def group_ranks(group: Any) -> Ranks:
    """All global ranks of a process group.

    Raises:
        LayoutError: this rank is not one of them.
    """
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise LayoutError(
            f"{group!r} is a process group that does not contain rank {dist.get_rank()}, on which it was passed. "
            "Pass each rank the group that it is part of."
        )
    return tuple(dist.get_process_group_ranks(group))


def _named(split_over: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(split_over, Mapping):
        yield from ((str(name), one) for name, one in split_over.items())
    elif isinstance(split_over, DeviceMesh | dist.ProcessGroup) or not isinstance(split_over, Iterable | None):
        yield None, split_over
    elif split_over is not None:
        yield from ((None, one) for one in split_over)


def _axes(one: Any, name: str | None) -> Iterator[Axis]:
    try:
        if isinstance(one, DeviceMesh):
            mesh_ranks(one)
            names = one.mesh_dim_names or (None,) * one.ndim
            for i, dim_name in enumerate(names):
                group = one.get_group(i)
                yield Axis(group_ranks(group), name or dim_name, group.group_name)
        elif isinstance(one, dist.ProcessGroup) or one == dist.GroupMember.NON_GROUP_MEMBER:
            yield Axis(group_ranks(one), name or _described(one), one.group_name)
        elif _is_comm(one) and one.ranks is not None:
            ranks = tuple(one.ranks)
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


def _described(group: Any) -> str | None:
    """A group's name from its description: "mesh_pp" (DeviceMesh), "TENSOR_MODEL_PARALLEL_GROUP" (Megatron)."""
    text = (group.group_desc or "").removeprefix("mesh_").removesuffix("_GROUP").lower()
    return None if text in ("", "undefined", "default", "default_pg") else text


def cut_along(tensor: Tensor, axes: tuple[Axis, ...], tags_in_use: frozenset[str]) -> tuple[bool, ...]:
    """Whether each axis that holds different tensors under one name holds the pieces of one parameter.

    It does on a tensor-parallel axis, by its name or by the tag; on any other the tensors are parameters of their own.
    """
    tagged = bool(getattr(tensor, "tensor_model_parallel", False))
    return tuple(
        _splits(axis, tensor, tags_in_use)
        and (_is_tensor_axis(axis) or (tagged and "tensor_model_parallel" in _speaking(axis, tags_in_use)))
        for axis in axes
    )


def _splits(axis: Axis, tensor: Tensor, tags_in_use: frozenset[str]) -> bool:
    speaking = _speaking(axis, tags_in_use)
    if not speaking:
        return True
    return ("tensor_model_parallel" in speaking and bool(getattr(tensor, "tensor_model_parallel", False))) or (
        "allreduce" in speaking and getattr(tensor, "allreduce", True) is False
    )


def _speaking(axis: Axis, tags_in_use: frozenset[str]) -> frozenset[str]:
    """Which of the tags in use speak of this axis: all of an axis without a name."""
    if not axis.name:
        return tags_in_use
    # "expert_tensor_parallel" is a tensor axis of experts: the tensor tag speaks of it.
    spoken = {"tensor_model_parallel"} if _is_tensor_axis(axis) else set[str]()
    if not spoken and (axis.name == "ep" or "expert" in axis.name):
        spoken = {"allreduce"}
    return tags_in_use & spoken


def _is_tensor_axis(axis: Axis) -> bool:
    return axis.name is not None and (axis.name == "tp" or "tensor" in axis.name)
