"""Annotate plain tensors with their layout: `annotate_` for users, `set_layout` for integrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm.ranks import Axis
from ..errors import ArgumentError
from .attributes import carry, remember
from .dtensor import is_dtensor, num_pieces_of, partial_sums_of
from .layout import Layout
from .replicas import mesh_replicas, replica_group
from .shard import PartialSum
from .source import LayoutReader, Request, Slice, Source
from .split_over import group_ranks, mesh_ranks

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "Annotation",
    "AnnotationSource",
    "annotate_",
    "annotated_sums",
    "annotation_of",
    "set_layout",
    "whole_shape",
]

_ATTRIBUTE = "_distclip_annotation"


@dataclass(frozen=True, slots=True)
class Annotation:
    """Layout that a tensor carries as an attribute.

    Args:
        layout: layout of the tensor.
        partial_sums: sums that its gradient needs.
        cuts: for each axis of the mesh that cuts the parameter, (dim, coordinate of this rank).
        slice: position in the flattened parameter, for a slice.
    """

    layout: Layout
    partial_sums: tuple[PartialSum, ...] = ()
    cuts: tuple[tuple[int, int], ...] = ()
    slice: Slice | None = None


class AnnotationSource(Source):
    """Layouts from `annotate_` and `set_layout`."""

    title = "annotate_"
    attributes = carry(_ATTRIBUTE)

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader of annotations."""
        return _read_layout

    def find_slices(self, request: Request) -> Mapping[int, Slice]:
        """Return the slices that were passed to `set_layout`: ZeRO's partitions."""
        slices = ((tensor, annotation_of(tensor).slice) for _, tensor in request.tensors)
        return {id(tensor): slice for tensor, slice in slices if slice is not None}

    def dim0_coords(
        self, name: str, tensor: Tensor, layout: Layout, axes: tuple[Axis, ...], rank: int
    ) -> tuple[int, ...]:
        """Return the coordinates along the annotated axes with Shard(0)."""
        return tuple(coord for dim, coord in annotation_of(tensor).cuts if dim % tensor.ndim == 0)


def annotate_(param: Tensor, mesh: DeviceMesh | dist.ProcessGroup, placements: Sequence[Placement]) -> Tensor:
    r"""Mark a plain tensor as a shard of a parameter, or as one of several replicas that count once.

    Args:
        param: a parameter. For a DTensor, the annotation adds axes to those of the tensor's mesh.
        mesh: the ranks that hold the shards or replicas, and no others.
        placements: one per mesh axis: `Shard(dim)` for different shards, `Replicate()` for replicas, `Partial()` if
            the true gradient is the sum of the ranks' gradients.

    Returns:
        `param`.

    Raises:
        ArgumentError: the number of placements differs from the number of axes, or one is not a
            torch.distributed.tensor placement.
        LayoutError: the mesh does not contain this rank.

    Collectives: none. Host syncs: none.

    Examples:
        An embedding that the first and the last pipeline stage share, after they have added up its gradients::

            annotate_(model.embed.weight, mesh=embedding_group, placements=[Replicate()])

        Experts as plain tensors, different ones on every rank of the "ep" axis::

            annotate_(experts.w1, mesh=mesh["ep"], placements=[Shard(0)])
    """
    from torch.distributed.tensor.placement_types import Placement

    ndim = mesh.ndim if isinstance(mesh, DeviceMesh) else 1
    placements = [placements] if isinstance(placements, Placement | str) else list(placements)
    if len(placements) != ndim or not all(isinstance(p, Placement) for p in placements):
        raise ArgumentError(
            f"placements={placements!r}: the mesh has {ndim} {'axis' if ndim == 1 else 'axes'} and each needs one of "
            "Shard(dim), Replicate(), Partial(). Use placements=[Shard(0)] for shards, [Replicate()] for replicas."
        )
    if isinstance(mesh, DeviceMesh):
        ranks, sizes = mesh_ranks(mesh), tuple(mesh.size(i) for i in range(ndim))
        axis_groups = [mesh.get_group(i) for i in range(ndim)]
        coordinates: Sequence[int] = mesh.get_coordinate() or ()
        replicas = mesh_replicas(mesh, placements)
    else:
        ranks = group_ranks(mesh)
        sizes, axis_groups, coordinates = (len(ranks),), [mesh], (dist.get_rank(mesh),)
        replicas = replica_group(ranks) if placements[0].is_replicate() else ()
    partial_sums = partial_sums_of(axis_groups, placements)
    layout = Layout((ranks,), num_pieces_of(sizes, placements), may_be_partial=bool(partial_sums), replicas=replicas)
    cuts = tuple(
        (int(getattr(placement, "dim", 0)), coordinate)
        for coordinate, placement in zip(coordinates, placements, strict=True)
        if not (placement.is_replicate() or placement.is_partial())
    )
    setattr(param, _ATTRIBUTE, Annotation(layout, partial_sums, cuts))
    remember(param)
    return param


def set_layout(tensor: Tensor, layout: Layout, slice: tuple[tuple[int, ...], int] | None = None) -> Tensor:
    """Attach a `Layout` to a tensor. This is the low-level form of `annotate_`, for integrations.

    Args:
        tensor: a parameter, or a 1-D tensor that is this rank's slice of a parameter.
        layout: its layout. `split` and `cut` have one entry for each axis of the `split_over=` of the same call.
        slice: for a slice, the shape of the whole parameter, and the index of the first local element in the flattened
            parameter.

    Returns:
        `tensor`.
    """
    setattr(tensor, _ATTRIBUTE, Annotation(layout, slice=None if slice is None else Slice(*slice)))
    remember(tensor)
    return tensor


_MAX_AXES = 64
"""More axes than any mesh has."""

_NO_ANNOTATION = Annotation(Layout())


def annotation_of(param: Tensor) -> Annotation:
    """Return the annotation of a tensor, or an empty one."""
    annotation: Annotation = getattr(param, _ATTRIBUTE, _NO_ANNOTATION)
    return annotation


def annotated_sums(tensor: Tensor) -> tuple[PartialSum, ...]:
    """Return the sums that a tensor's gradient needs according to the annotation."""
    sums = annotation_of(tensor).partial_sums
    # The mesh axes of a DTensor are numbered from 0, and the axes of the annotation come before them.
    return tuple(replace(one, axis=one.axis - _MAX_AXES) for one in sums) if is_dtensor(tensor) else sums


def whole_shape(tensor: Tensor, layout: Layout) -> tuple[int, ...]:
    """Return the shape of a whole parameter, with -1 for a dim of unknown size.

    Args:
        tensor: a parameter or a gradient.
        layout: its layout.
    """
    annotation, shape = annotation_of(tensor), list(tensor.shape)
    if annotation.slice is not None:
        return annotation.slice.shape
    if not annotation.cuts and layout.num_pieces > 1 and not is_dtensor(tensor):
        return (-1,) * tensor.ndim
    for dim, _ in annotation.cuts:
        shape[dim] = -1
    return tuple(shape)


def _read_layout(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
    layout = annotation_of(tensor).layout
    return layout if layout.groups else known
