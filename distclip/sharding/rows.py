"""Which rows of a parameter a rank holds, for policies that give every row a norm of its own.

A row is a place along dim 0; a parameter of at most one dim is a single row, in whatever pieces it lies. Rows that are
cut (a shard along another dim, a slice of a flattened parameter) are summed over the ranks that hold their parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..comm.ranks import Axis
from ..errors import LayoutError
from .annotations import annotation_of
from .dtensor import is_dtensor
from .layout import Layout
from .shard import Rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Cut", "cut_of", "dtensor_rows"]


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank knows of a parameter's rows.

    Args:
        rows: those that it holds, counted from the first of the piece.
        length: how many rows the piece has.
        piece: which piece of the parameter that is, in the order of the rows; empty where there is only one.
    """

    rows: Rows
    length: int
    piece: tuple[int, ...] = ()


def cut_of(
    name: str,
    tensor: Tensor,
    layout: Layout,
    axes: tuple[Axis, ...],
    slices: Mapping[int, tuple[tuple[int, ...], int]],
    rank: int,
) -> Cut | None:
    """The rows of one parameter on this rank; None for a parameter that is a single row.

    Args:
        name: of the parameter.
        tensor: a parameter.
        layout: where it lies.
        axes: of `split_over=`.
        slices: see `flat_slices`.
        rank: this one, globally.

    Raises:
        LayoutError: nobody says along which dim the parameter was cut.
    """
    shape, start = slices.get(id(tensor), (tuple(tensor.shape), 0))
    if len(shape) < 2:
        return None
    piece: tuple[int, ...] = ()
    if id(tensor) in slices:
        width = math.prod(shape[1:])
        lead = start % width if width else 0
        count = -(-(lead + tensor.numel()) // width) if tensor.numel() else 0
        rows = Rows(start // max(1, width), count, lead, width)
    else:
        rows = dtensor_rows(tensor) if is_dtensor(tensor) else Rows(0, shape[0])
        piece = tuple(place for dim, place in annotation_of(tensor).cuts if dim % tensor.ndim == 0)
    for axis, cut in zip(axes, layout.cut, strict=True):
        dim = getattr(tensor, "partition_dim", None)
        if cut and dim is None:
            raise LayoutError(
                f"{name} is one of several pieces along {axis}, and nothing says along which dim it was cut: is a row "
                "of it a whole row? Write distclip.annotate_(param, mesh, [Shard(dim)]), or set param.partition_dim."
            )
        if cut and dim == 0:
            piece += (axis.ranks.index(rank),)
    return Cut(rows, shape[0], piece)


def dtensor_rows(tensor: DTensor) -> Rows:
    """The rows of a DTensor's local piece.

    Strided shards (FSDP2 over tensor parallelism) are made last, whatever the order of the axes: they cut what the
    others have left.
    """
    mesh, (first, count) = tensor.device_mesh, (0, tensor.shape[0])
    order = sorted(range(mesh.ndim), key=lambda i: type(tensor.placements[i]).__name__ == "_StridedShard")
    for i in order:
        placement = tensor.placements[i]
        if placement.is_replicate() or placement.is_partial() or placement.dim != 0:  # type: ignore[attr-defined]
            continue
        each = -(-count // mesh.size(i))
        start = min(each * mesh.get_local_rank(i), count)
        first, count = first + start, min(each, count - start)
    held = tensor._local_tensor.shape[0]
    if held != count:
        raise LayoutError(
            f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} holds {held} rows here "
            f'where {count} were expected: its rows have no norm of their own. Write per="tensor".'
        )
    return Rows(first, count)
