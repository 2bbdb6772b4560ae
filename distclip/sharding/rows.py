"""Find the rows of a parameter that a rank holds, for policies with a norm per row.

A row is an index along dim 0. A parameter with at most one dim is a single row. A row can be cut, by a shard along
another dim or by a slice of a flattened parameter. Its norm is then summed over the ranks that hold parts of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..comm.ranks import Axis
from .layout import Layout
from .shard import Rows
from .source import Slice
from .table import SOURCES

__all__ = ["LocalRows", "local_rows"]


@dataclass(frozen=True, slots=True)
class LocalRows:
    """Rows of a parameter on one rank.

    Args:
        rows: rows that the rank holds, counted from the first row of the piece.
        num_rows: number of rows in the piece.
        piece: coordinates of the piece among the pieces of the parameter, in the order of the rows. Empty if the
            parameter has one piece.
    """

    rows: Rows
    num_rows: int
    piece: tuple[int, ...] = ()


def local_rows(
    name: str, tensor: Tensor, layout: Layout, axes: tuple[Axis, ...], slice: Slice | None, rank: int
) -> LocalRows | None:
    """Return the rows of one parameter on this rank, or None if the parameter is a single row.

    Args:
        name: name of the parameter, for errors.
        tensor: the parameter.
        layout: its layout.
        axes: axes of `split_over=`.
        slice: position of the tensor in a flattened parameter, or None for a whole parameter.
        rank: global rank of this process.

    Raises:
        LayoutError: the parameter was cut along an unknown dim.
    """
    shape = tuple(tensor.shape) if slice is None else slice.shape
    if len(shape) < 2:
        return None
    rows: Rows | None = None
    if slice is not None:
        # A slice can begin and end anywhere, even within a row.
        width = math.prod(shape[1:])
        lead = slice.start % width if width else 0
        count = -(-(lead + tensor.numel()) // width) if tensor.numel() else 0
        rows = Rows(slice.start // max(1, width), count, lead, width)
    for source in SOURCES:
        rows = rows or source.find_rows(tensor)
    # If no source has the index of the first row, the order of the pieces follows from the rank's coordinates along the
    # axes that cut dim 0, and the lengths of the other pieces come from the other ranks.
    coords = [source.dim0_coords(name, tensor, layout, axes, rank) for source in SOURCES]
    return LocalRows(rows or Rows(0, shape[0]), shape[0], tuple(coord for piece in coords for coord in piece))
