"""Read the layouts of plain tensors from their `spmd_types`, torchtitan's default.

A tensor has a type for each axis of a mesh, as the attribute `_local_type`: R and I for replicas, V for different
values. For V, `_partition_spec` names the axes that cut each dim. `spmd_types` itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..comm.ranks import Axis, Ranks
from ..errors import LayoutError
from .dtensor import is_dtensor
from .layout import Layout
from .replicas import replica_group
from .source import LayoutReader, Request, Source

__all__ = ["SpmdTypesSource"]

_TYPES, _SPEC = "_local_type", "_partition_spec"


class SpmdTypesSource(Source):
    """Plain tensors with types of `spmd_types`."""

    title = "spmd_types"
    attributes = frozenset({_TYPES, _SPEC})
    dict_attributes = frozenset({_TYPES})

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader of types, or None if no tensor has any."""
        return _read_layout if any(_types_of(tensor) for _, tensor in request.tensors) else None

    def dim0_coords(
        self, name: str, tensor: Tensor, layout: Layout, axes: tuple[Axis, ...], rank: int
    ) -> tuple[int, ...]:
        """Return the coordinates along the axes that `_partition_spec` has for dim 0.

        Raises:
            LayoutError: a tensor varies along an axis, and no dim is known to be cut.
        """
        if is_dtensor(tensor) or not (varying := [a for a, kind in _types_of(tensor).items() if kind == "V"]):
            return ()
        cuts = [_as_tuple(entry) for entry in vars(tensor).get(_SPEC) or ()]
        if unknown := [axis for axis in varying if not any(axis in entry for entry in cuts)]:
            raise LayoutError(
                f"{name} varies along {unknown[0]!r} of spmd_types, and the dim that is cut is unknown, so that its "
                "rows cannot be numbered. Use S(dim) in place of V in spmd_types.assert_type."
            )
        return tuple(_coordinate(axis, rank) for axis in cuts[0])


def _types_of(tensor: Tensor) -> dict[Any, str]:
    """Return the name of the type for each axis. Axes with one rank have none."""
    return {axis: str(kind.value) for axis, kind in (vars(tensor).get(_TYPES) or {}).items() if axis.size() > 1}


def _as_tuple(entry: Any) -> tuple[Any, ...]:
    """Return the axes of an entry of a PartitionSpec: None, an axis, or several, the outermost first."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _read_layout(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
    # FSDP2 converts such tensors to DTensors, whose placements contain the types.
    if known is not None or is_dtensor(tensor) or not (types := _types_of(tensor)):
        return known
    if partial := [axis for axis, kind in types.items() if kind == "P"]:
        raise LayoutError(
            f"{name} has type P along {partial[0]!r} of spmd_types: a parameter that is a sum over ranks has no norm. "
            "Reduce it, or declare R, I or S(dim) in spmd_types.assert_type."
        )
    rank = dist.get_rank()
    varying = [axis for axis, kind in types.items() if kind == "V"]
    num_pieces = 1
    for axis in varying:
        num_pieces *= int(axis.size())
    return Layout(
        groups=(_ranks_along(types, rank),),
        num_pieces=num_pieces,
        # Each rank reduces its gradient itself, in backward.
        replicas=replica_group(_ranks_along([axis for axis in types if axis not in varying], rank), is_exact=False),
    )


def _ranks_along(axes: Iterable[Any], rank: int) -> Ranks:
    """Return the ranks whose coordinates differ from those of a rank only along these axes."""
    atoms = [atom for axis in axes for atom in _atoms(axis)]
    first = rank - sum((rank // stride) % size * stride for size, stride in atoms)
    steps = product(*(range(0, size * stride, stride) for size, stride in atoms))
    return tuple(sorted(first + sum(offsets) for offsets in steps))


def _coordinate(axis: Any, rank: int) -> int:
    """Return the coordinate of a rank along an axis."""
    coordinate = 0
    for size, stride in _atoms(axis):
        coordinate = coordinate * size + (rank // stride) % size
    return coordinate


def _atoms(axis: Any) -> list[tuple[int, int]]:
    """Return (size, stride) of the ranks along an axis, the outermost first."""
    return [(int(size), int(stride)) for size, stride in axis.layout.sizes_and_strides]
