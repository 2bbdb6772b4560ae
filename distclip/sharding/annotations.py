"""Plain tensors that say where they lie through attributes: `annotate_`'s, and Megatron's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comm.discovery import job_size
from ..comm.ranks import Axis
from ..errors import ArgumentError, LayoutError
from .dtensor import pending_of, pieces_of
from .layout import Layout
from .shard import PartialSum
from .split_over import group_ranks, mesh_ranks

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Annotation", "annotate_", "annotation_of", "check_tags", "set_layout", "tags_in_use"]

_ATTRIBUTE = "_distclip_annotation"


@dataclass(frozen=True, slots=True)
class Annotation:
    """What `annotate_` was told: the layout it means, the sums that a gradient still waits for, and along each axis
    that cuts the parameter (dim, this rank's place). Or, of what `set_layout` was told: the layout, and of a slice the
    shape of the whole parameter and where in it, counted in elements, the slice begins."""

    layout: Layout
    partial_sums: tuple[PartialSum, ...] = ()
    cuts: tuple[tuple[int, int], ...] = ()
    slice: tuple[tuple[int, ...], int] | None = None


def annotate_(param: Tensor, mesh: DeviceMesh | dist.ProcessGroup, placements: Sequence[Placement]) -> Tensor:
    r"""Say of a plain tensor that it is a shard of a parameter, or one of several copies that must count once.

    Args:
        param: a parameter. For a DTensor the annotation adds axes to those it has.
        mesh: the ranks that hold its pieces or copies, and no others.
        placements: one per mesh axis: `Shard(dim)` for different pieces, `Replicate()` for copies, `Partial()` where
            each rank's gradient is a summand of the true one.

    Returns:
        `param`.

    Raises:
        ArgumentError: as many placements as axes are needed, each a torch.distributed.tensor placement.
        LayoutError: the mesh does not contain this rank.

    Collectives: none. Host syncs: none.

    Examples:
        An embedding tied between the first and the last pipeline stage, whose gradients the stages have added up::

            annotate_(model.embed.weight, mesh=embedding_group, placements=[Replicate()])

        Experts kept as plain tensors, each rank of the "ep" axis its own::

            annotate_(experts.w1, mesh=mesh["ep"], placements=[Shard(0)])
    """
    from torch.distributed.tensor.placement_types import Placement

    spans = mesh.ndim if isinstance(mesh, DeviceMesh) else 1
    if len(placements) != spans or not all(isinstance(p, Placement) for p in placements):
        raise ArgumentError(
            f"placements={placements!r}: the mesh has {spans} {'axis' if spans == 1 else 'axes'} and each needs one of "
            "Shard(dim), Replicate(), Partial(). Write placements=[Shard(0)] for pieces, [Replicate()] for copies."
        )
    if isinstance(mesh, DeviceMesh):
        ranks, sizes = mesh_ranks(mesh), tuple(mesh.size(i) for i in range(spans))
        axis_groups = [mesh.get_group(i) for i in range(spans)]
    else:
        ranks = group_ranks(mesh)
        sizes, axis_groups = (len(ranks),), [mesh]
    partial_sums = pending_of(axis_groups, placements)
    layout = Layout(groups=(ranks,), pieces=pieces_of(sizes, placements), may_be_partial=bool(partial_sums))
    cuts = tuple(
        (int(getattr(placement, "dim", 0)), dist.get_rank(group))
        for group, placement in zip(axis_groups, placements, strict=True)
        if not (placement.is_replicate() or placement.is_partial())
    )
    setattr(param, _ATTRIBUTE, Annotation(layout, partial_sums, cuts))
    return param


def set_layout(tensor: Tensor, layout: Layout, slice: tuple[tuple[int, ...], int] | None = None) -> Tensor:
    """Say where a tensor lies, for an owner that knows it all: what `annotate_` does in words of placements.

    Args:
        tensor: a parameter, or a 1-D tensor in place of one: this rank's slice of it.
        layout: its own; `split` and `cut` have one entry for each axis of the `split_over=` that goes with it.
        slice: of a slice, the shape of the whole parameter and its first element here, counted in elements.

    Returns:
        `tensor`.
    """
    setattr(tensor, _ATTRIBUTE, Annotation(layout, slice=slice))
    return tensor


_UNSAID = Annotation(Layout())


def annotation_of(param: Tensor) -> Annotation:
    """What `annotate_` was told of the tensor; if nothing was, a layout that spans nothing."""
    found: Annotation = getattr(param, _ATTRIBUTE, _UNSAID)
    return found


def tags_in_use(tensors: Sequence[Tensor]) -> frozenset[str]:
    """Which of Megatron's attributes the tensors of a call carry: `tensor_model_parallel`, `allreduce=False`."""
    used: set[str] = set()
    for tensor in tensors:
        if hasattr(tensor, "tensor_model_parallel"):
            used.add("tensor_model_parallel")
        if getattr(tensor, "allreduce", True) is False:
            used.add("allreduce")
    return frozenset(used)


def check_tags(named: Sequence[tuple[str, Tensor]], axes: Sequence[Axis], used: frozenset[str]) -> None:
    """Refuse tags that speak of no axis, or of one that cannot be told.

    Raises:
        ArgumentError: several axes without names, or one for two kinds of tags.
        LayoutError: a shard by its tag, and no axis along which it could lie.
    """
    unnamed = [axis for axis in axes if axis.name is None]
    sharded = [n for n, t in named if getattr(t, "tensor_model_parallel", False)]
    experts = [n for n, t in named if getattr(t, "allreduce", True) is False]
    if used and (len(unnamed) > 1 or (unnamed and sharded and experts)):
        raise ArgumentError(
            f"split_over= has {len(unnamed)} axes without a name and the parameters carry {sorted(used)}: which axis "
            'do the tags speak of? Name them: split_over={"pp": pp_group, "tp": tp_group, "ep": ep_group}.'
        )
    if job_size() == 1 or unnamed:
        return
    names = [axis.name or "" for axis in axes]
    for tagged, tag, short, word in (
        (sharded, "tensor_model_parallel=True", "tp", "tensor"),
        (experts, "allreduce=False", "ep", "expert"),
    ):
        if tagged and not any(name == short or word in name for name in names):
            raise LayoutError(
                f"{tagged[0]} carries {tag}, so other ranks hold other pieces of it, and no axis says which ranks. "
                f'Write split_over={{"{short}": {short}_group}} (a group of one rank if there is no such parallelism).'
            )
