"""DTensors: FSDP2, HSDP, tensor, sequence and expert parallelism, and every product of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor

from ..errors import LayoutError
from .layout import Layout
from .shard import PartialSum
from .split_over import mesh_ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "dtensor_axes",
    "dtensor_class",
    "dtensor_layout",
    "dtensor_pending",
    "is_dtensor",
    "pending_of",
    "pieces_of",
]


def dtensor_class() -> type[DTensor] | None:
    """torch's DTensor, without importing what defines it (a second's work) where nobody has."""
    defined: Any = sys.modules.get("torch.distributed.tensor")
    return None if defined is None else defined.DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    defined = dtensor_class()
    return defined is not None and isinstance(tensor, defined)


def dtensor_layout(tensor: DTensor) -> Layout:
    """Where a DTensor lies: all ranks of its mesh, in as many pieces as its sharded axes have places.

    Uneven and empty shards are pieces like any other; so are the strided ones of FSDP2 over tensor parallelism,
    which do not call themselves `Shard`.

    Raises:
        LayoutError: the mesh does not contain this rank.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    sizes = tuple(mesh.size(i) for i in range(mesh.ndim))
    return Layout(
        groups=(mesh_ranks(mesh),),
        pieces=pieces_of(sizes, placements),
        may_be_partial=any(_whole(p) and n > 1 for p, n in zip(placements, sizes, strict=True)),
    )


def dtensor_pending(tensor: DTensor) -> tuple[PartialSum, ...]:
    """The sums that a Partial gradient waits for.

    Raises:
        LayoutError: it is to be combined by something else than a sum or a mean.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if not any(p.is_partial() for p in placements):
        return ()
    return pending_of([mesh.get_group(i) for i in range(mesh.ndim)], placements)


def dtensor_axes(tensor: DTensor) -> tuple[PartialSum, ...]:
    """A sum over each axis of the tensor's mesh: those that its gradient could wait for."""
    groups = [tensor.device_mesh.get_group(i) for i in range(tensor.device_mesh.ndim)]
    return tuple(PartialSum(tuple(dist.get_process_group_ranks(group)), group, i) for i, group in enumerate(groups))


def pieces_of(sizes: Sequence[int], placements: Sequence[Placement]) -> int:
    """Into how many different pieces the placements cut a tensor over a mesh of those sizes."""
    return math.prod(size for size, placement in zip(sizes, placements, strict=True) if not _whole(placement))


def pending_of(groups: Sequence[dist.ProcessGroup], placements: Sequence[Placement]) -> tuple[PartialSum, ...]:
    """One `Pending` per Partial placement over more than one rank."""
    found: list[PartialSum] = []
    for i, (group, placement) in enumerate(zip(groups, placements, strict=True)):
        if not placement.is_partial() or dist.get_world_size(group) == 1:
            continue
        op = getattr(placement, "reduce_op", None)
        if op not in ("sum", "avg"):
            raise LayoutError(
                f"a gradient has placement {placement}, which is neither a sum nor a mean over ranks and so no "
                "gradient. Redistribute it to Replicate() or Shard(dim) before clipping."
            )
        found.append(PartialSum(tuple(dist.get_process_group_ranks(group)), group, i, op == "avg"))
    return tuple(found)


def _whole(placement: Placement) -> bool:
    """Whether every rank of the axis holds all of the tensor, or a summand of all of it."""
    return placement.is_replicate() or placement.is_partial()
