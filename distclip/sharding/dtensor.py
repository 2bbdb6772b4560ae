"""Read the layouts of DTensors: FSDP2, HSDP, tensor, sequence and expert parallelism, and products of them."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LayoutError
from .layout import Layout, product
from .replicas import mesh_replicas
from .shard import PartialSum, Rows
from .source import LayoutReader, Request, Source
from .split_over import mesh_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "DTensorSource",
    "dtensor_class",
    "dtensor_layout",
    "dtensor_partial_sums",
    "dtensor_rows",
    "is_dtensor",
    "local_of",
    "num_pieces_of",
    "partial_sums_of",
    "possible_partial_sums",
    "with_local",
]


_PLAIN_TYPES = (Tensor, nn.Parameter)


class DTensorSource(Source):
    """DTensors, which carry their mesh and placements."""

    title = "placements"

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader that multiplies an annotation's layout with the DTensor's own."""
        return None if dtensor_class() is None else _read_layout

    def find_rows(self, tensor: Tensor) -> Rows | None:
        """Return the rows of a DTensor's local shard."""
        return dtensor_rows(tensor) if is_dtensor(tensor) else None


def dtensor_class() -> type[DTensor] | None:
    """Return torch's DTensor, or None if the program has not imported it."""
    # The import takes about a second, and a program without DTensors must not pay for it.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    cls = dtensor_class()
    return cls is not None and isinstance(tensor, cls)


def local_of(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, or any other tensor unchanged."""
    # Each step calls this for several tensors, most of which are plain.
    if type(tensor) in _PLAIN_TYPES:
        return tensor
    module: Any = sys.modules.get("torch.distributed.tensor")
    is_local = module is None or not isinstance(tensor, module.DTensor)
    return tensor if is_local else tensor._local_tensor  # type: ignore[attr-defined]


def _read_layout(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
    if not is_dtensor(tensor):
        return known
    layout = dtensor_layout(tensor)
    return layout if known is None else product(layout, known)


def dtensor_layout(tensor: DTensor) -> Layout:
    """Return the layout of a DTensor: one piece for each coordinate of its sharded axes.

    Raises:
        LayoutError: the mesh does not contain this rank.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    sizes = tuple(mesh.size(i) for i in range(mesh.ndim))
    return Layout(
        groups=(mesh_ranks(mesh),),
        num_pieces=num_pieces_of(sizes, placements),
        may_be_partial=any(_is_full(p) and n > 1 for p, n in zip(placements, sizes, strict=True)),
        replicas=mesh_replicas(mesh, placements),
    )


def dtensor_partial_sums(tensor: DTensor) -> tuple[PartialSum, ...]:
    """Return the sums that a DTensor with Partial placements needs.

    Raises:
        LayoutError: a placement's reduction is neither a sum nor a mean.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if not any(p.is_partial() for p in placements):
        return ()
    return partial_sums_of([mesh.get_group(i) for i in range(mesh.ndim)], placements)


_sums_of_mesh: weakref.WeakKeyDictionary[DeviceMesh, tuple[PartialSum, ...]] = weakref.WeakKeyDictionary()


def possible_partial_sums(tensor: DTensor) -> tuple[PartialSum, ...]:
    """Return a sum over each axis of the tensor's mesh: every sum that its gradient could need."""
    # One object for all parameters of a mesh, so that thousands of them pickle as references to it.
    mesh = tensor.device_mesh
    if (sums := _sums_of_mesh.get(mesh)) is None:
        sums = tuple(_sum_over(mesh.get_group(i), i) for i in range(mesh.ndim))
        _sums_of_mesh[mesh] = sums
    return sums


def _sum_over(group: dist.ProcessGroup, axis: int, *, mean: bool = False) -> PartialSum:
    return PartialSum(tuple(dist.get_process_group_ranks(group)), group.group_name, axis, mean)


def with_local(tensor: DTensor, local: Tensor) -> DTensor:
    """Return a DTensor with the placements of another one, and another local tensor of the same shape."""
    return type(tensor).from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def num_pieces_of(sizes: Sequence[int], placements: Sequence[Placement]) -> int:
    """Return the number of different shards that the placements make over a mesh of these sizes."""
    # Shards are found by exclusion, because the strided shards of FSDP2 over tensor parallelism are not of the class
    # `Shard`. Uneven and empty shards count like any other.
    return math.prod(size for size, placement in zip(sizes, placements, strict=True) if not _is_full(placement))


def partial_sums_of(groups: Sequence[dist.ProcessGroup], placements: Sequence[Placement]) -> tuple[PartialSum, ...]:
    """Return one `PartialSum` per Partial placement over more than one rank.

    Raises:
        LayoutError: see `dtensor_partial_sums`.
    """
    sums: list[PartialSum] = []
    for i, (group, placement) in enumerate(zip(groups, placements, strict=True)):
        if not placement.is_partial() or dist.get_world_size(group) == 1:
            continue
        # A third-party placement can be partial in another way.
        op = getattr(placement, "reduce_op", None)
        if op not in ("sum", "avg"):
            raise LayoutError(
                f"a gradient has placement {placement}, which is neither a sum nor a mean over ranks and so no "
                "gradient. Redistribute it to Replicate() or Shard(dim) before clipping."
            )
        sums.append(_sum_over(group, i, mean=op == "avg"))
    return tuple(sums)


def _is_full(placement: Placement) -> bool:
    """Return whether every rank along the axis holds a tensor of full size: a replica, or a summand."""
    return placement.is_replicate() or placement.is_partial()


def _coordinates_of(mesh: DeviceMesh, rank: int) -> list[int]:
    """Return the coordinates of a rank of a mesh."""
    index, coordinates = mesh_ranks(mesh).index(rank), []
    for i in reversed(range(mesh.ndim)):
        index, coordinate = divmod(index, mesh.size(i))
        coordinates.append(coordinate)
    return coordinates[::-1]


def dtensor_rows(tensor: DTensor, rank: int | None = None, at: int | None = None) -> Rows:
    """Return the rows of a DTensor's local shard.

    Args:
        tensor: the DTensor.
        rank: a rank that this process simulates. None for this rank.
        at: the rank of the mesh that has the coordinates of `rank`.

    Raises:
        LayoutError: torch has not cut the tensor as expected.
    """
    mesh, (first, count) = tensor.device_mesh, (0, tensor.shape[0])
    coordinates: Sequence[int] = (mesh.get_coordinate() if at is None else _coordinates_of(mesh, at)) or ()
    # Strided shards (FSDP2 over tensor parallelism) are cut from what the other axes have left, in any order of axes.
    order = sorted(range(mesh.ndim), key=lambda i: type(tensor.placements[i]).__name__ == "_StridedShard")
    for i in order:
        placement = tensor.placements[i]
        if _is_full(placement) or placement.dim != 0:  # type: ignore[attr-defined]
            continue
        # torch cuts as in torch.chunk: all pieces have the same length, except the last ones.
        length = -(-count // mesh.size(i))
        # This is the coordinate in the mesh and not the rank in the group, because torch sorts the ranks of a group.
        start = min(length * coordinates[i], count)
        first, count = first + start, min(length, count - start)
    local: Any = tensor._local_tensor
    if rank is not None or type(local).__name__ == "LocalTensor":
        local = local._local_tensors[dist.get_rank() if rank is None else rank]
    num_local = local.shape[0]
    if num_local != count:
        raise LayoutError(
            f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} holds {num_local} rows here "
            f'where {count} were expected, so that its rows cannot be numbered. Use per="tensor".'
        )
    return Rows(first, count)
