"""Read the facts of one rank: its parameters, their layouts, and numbers to compare with other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from ..comm.consensus import FirstError, wire_of
from ..comm.ranks import Axis, Ranks
from ..devices import is_fake
from ..errors import DistclipError
from ..sharding.annotations import annotation_of
from ..sharding.dtensor import is_dtensor
from ..sharding.layout import Layout
from ..sharding.local_tensors import ranks_of
from ..sharding.source import Request, Slice
from ..sharding.split_over import name_from_description
from ..sharding.table import SOURCES, ShardTable
from .probe import Box, Values, measure_probe, read_values

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Facts", "Holding", "Line", "Spread", "read_facts"]

Line: TypeAlias = tuple[str, Ranks]
"""Name of a mesh axis, or "", and the ranks along it through one rank."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Distribution of a tensor along one axis, in the order of the axes.

    Args:
        kind: "shard", "slice", "replica" or "partial".
        over: name of the axis, or "".
        ranks: ranks along the axis, this one included.
        num_pieces: number of different pieces along the axis.
        dim: dim that the axis cuts, for a shard.
    """

    kind: str
    over: str
    ranks: Ranks
    num_pieces: int = 1
    dim: int | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """One parameter, or the part of it that one rank holds.

    Args:
        name: name of the parameter.
        dtype: name of its dtype.
        shape: shape of the local tensor.
        whole: shape of the whole parameter, as far as this rank has it.
        box: position of the local tensor in the whole. None if it is unknown.
        cuts: for each axis that cuts the parameter in a way that `box` does not show: (dim or None, coordinate).
        layout: layout that the engine counts by.
        source: origin of the layout, for example "placements". Empty for a plain tensor.
        spreads: the layout in detail.
        trainable: whether it requires a gradient.
        num_bytes: size of the local tensor.
        code_sum: sum of the probe's elements here.
        values: fingerprint of the values here.
        num_steps: number of optimizer groups that step it, None without optimizers.
        twin: name of an earlier parameter of this rank in the same memory, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    box: Box | None
    cuts: tuple[tuple[int | None, int], ...]
    layout: Layout
    source: str
    spreads: tuple[Spread, ...]
    trainable: bool
    num_bytes: int
    code_sum: int
    values: Values
    num_steps: int | None
    twin: str | None = None

    @property
    def num_elements(self) -> int:
        """Number of local elements."""
        return torch.Size(self.shape).numel()

    @property
    def is_informative(self) -> bool:
        """True if equal values on another rank are hardly a coincidence, unless the seeds are equal."""
        return self.trainable and self.values.checksum is not None and not self.values.is_constant


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one rank.

    Args:
        holdings: its parameters, in order.
        axes: axes of its `split_over=`.
        lines: mesh axes and process groups that it belongs to, for suggestions.
        error: class and message of the first error, or None.
        has_optimizer: whether optimizers were passed.
        foreign: descriptions of tensors that an optimizer steps and the model does not have.
    """

    holdings: tuple[Holding, ...] = ()
    axes: tuple[Axis, ...] = ()
    lines: tuple[Line, ...] = ()
    error: tuple[str, str] | None = None
    has_optimizer: bool = False
    foreign: tuple[str, ...] = ()

    @property
    def spans(self) -> frozenset[Ranks]:
        """Ranks of each mesh and axis."""
        groups = (ranks for holding in self.holdings for ranks in holding.layout.groups)
        return frozenset((*groups, *(axis.ranks for axis in self.axes)))


@torch.no_grad()
def read_facts(
    table: ShardTable,
    module: nn.Module | None,
    stepped: Sequence[Tensor] | None,
    rank: int,
    error: BaseException | None,
    *,
    all_train: bool = False,
) -> Facts:
    """Read the facts of this rank. No argument is changed.

    Args:
        table: parameters with their layouts.
        module: module that the caller passed, or None.
        stepped: tensors that optimizers step, or None without optimizers.
        rank: global rank of this process.
        error: earlier error of this rank, or None.
        all_train: True if tensors that require no gradient are not frozen, because their gradients are elsewhere.

    Collectives: none. Host syncs: a few per parameter.
    """
    errors = FirstError(error or table.error)
    named = list(zip(table.names, table.tensors, strict=True))
    request = Request(named, module, table.axes, FirstError())
    slices = _find_slices(request)
    sources = _find_sources(request)
    lines = _read_lines(table)
    names = {ranks: name for name, ranks in reversed(lines)}
    counts: dict[int, int] = {}
    for tensor in stepped or ():
        counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    twins = _find_twins(named)
    holdings = []
    for (name, tensor), layout in zip(named, table.layouts, strict=True):
        with errors:
            reader = _Reader(name, tensor, layout, table.axes, slices.get(id(tensor)), sources[id(tensor)], names, rank)
            steps = None if stepped is None else counts.get(id(tensor), 0)
            trainable = tensor.requires_grad or all_train
            holdings.append(reader.read(trainable, steps, twins.get(id(tensor))))
    own = set(map(id, table.tensors))
    foreign = [f"{_dtype_name(t)} {list(t.shape)}" for t in stepped or () if id(t) not in own]
    return Facts(
        holdings=tuple(holdings),
        axes=table.axes,
        lines=lines,
        error=wire_of(errors.error),
        has_optimizer=stepped is not None,
        foreign=tuple(foreign),
    )


class _Reader:
    """Reads one parameter.

    Args:
        name, tensor, layout: the parameter.
        axes: axes of `split_over=`.
        slice: position in the flattened parameter, for a slice.
        source: origin of the layout.
        names: name of the mesh axis or group with these ranks.
        rank: global rank of this process.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        layout: Layout,
        axes: tuple[Axis, ...],
        slice: Slice | None,
        source: str,
        names: Mapping[Ranks, str],
        rank: int,
    ) -> None:
        self.name, self.tensor, self.layout, self.axes = name, tensor, layout, axes
        self.slice, self.source, self.names, self.rank = slice, source, names, rank

    def read(self, trainable: bool, num_steps: int | None, twin: str | None) -> Holding:
        """Return the holding."""
        local = local_tensor(self.tensor)
        box, whole = self._position(local)
        cuts = tuple(self._cuts())
        if box is None and not cuts and self.layout.num_pieces > 1:
            # Nothing shows the order of the pieces, but each of them still counts.
            members = sorted(self.layout.members)
            cuts = ((None, members.index(self.rank) * self.layout.num_pieces // len(members)),)
        shape = self.slice.shape if self.slice is not None else whole
        return Holding(
            name=self.name,
            dtype=_dtype_name(self.tensor),
            shape=tuple(local.shape),
            whole=shape,
            box=box,
            cuts=cuts,
            layout=self.layout,
            source=self.source,
            spreads=tuple(self._spreads()),
            trainable=trainable,
            num_bytes=local.numel() * local.element_size(),
            code_sum=measure_probe(local, box, whole) if trainable else 0,
            values=read_values(local),
            num_steps=num_steps,
            twin=twin,
        )

    def _position(self, local: Tensor) -> tuple[Box | None, tuple[int, ...]]:
        """Return the box of the local tensor, and the shape that it is a box of."""
        if is_dtensor(self.tensor):
            return dtensor_box(self.tensor), tuple(self.tensor.shape)
        if self.slice is not None:
            return ((self.slice.start, local.numel()),), (torch.Size(self.slice.shape).numel(),)
        if self.source == "FSDP1" and self.layout.num_pieces > 1:
            # This is the flat parameter of a module that was wrapped without use_orig_params=True. Its last slice is
            # padded.
            shards = self.layout.groups[0]
            return ((shards.index(self.rank) * local.numel(), local.numel()),), (len(shards) * local.numel(),)
        return None, tuple(local.shape)

    def _cuts(self) -> Iterator[tuple[int | None, int]]:
        yield from annotation_of(self.tensor).cuts
        for axis, cut in zip(self.axes, self.layout.cut, strict=True):
            if cut:
                yield self._partition_dim, axis.ranks.index(self.rank)

    @property
    def _partition_dim(self) -> int | None:
        return vars(self.tensor).get("partition_dim")

    def _spreads(self) -> Iterator[Spread]:
        annotation = annotation_of(self.tensor)
        rest = self.layout.groups
        if is_dtensor(self.tensor):
            mesh = self.tensor.device_mesh
            rest = rest[1:]
            for i, placement in enumerate(self.tensor.placements):
                ranks = tuple(dist.get_process_group_ranks(mesh.get_group(i)))
                name = mesh.mesh_dim_names[i] if mesh.mesh_dim_names else self.names.get(ranks, "")
                if placement.is_replicate() or placement.is_partial():
                    yield Spread("replica" if placement.is_replicate() else "partial", name, ranks)
                else:
                    # Strided shards are not of the class `Shard`, but have its dim.
                    yield Spread("shard", name, ranks, len(ranks), placement.dim)  # type: ignore[attr-defined]
        if annotation.layout.groups:
            # An integration can have set several groups: shards within a node, replicas across nodes.
            ranks, rest = annotation.layout.groups[0], rest[1:]
            num_pieces = annotation.layout.num_pieces
            if annotation.partial_sums:
                yield self._spread("partial", ranks)
            elif annotation.slice is not None:
                yield self._spread("slice", ranks, num_pieces)
            elif len(annotation.cuts) > 1:
                for cut_dim, _ in annotation.cuts:
                    yield Spread("shard", "", ranks, num_pieces, cut_dim % self.tensor.ndim)
            elif num_pieces > 1:
                dim = annotation.cuts[0][0] % self.tensor.ndim if annotation.cuts else None
                yield self._spread("shard", ranks, num_pieces, dim)
            else:
                yield self._spread("replica", ranks)
        elif self.layout.num_pieces > 1 and not is_dtensor(self.tensor):
            yield self._spread("slice", rest[0], self.layout.num_pieces)
            rest = rest[1:]
        for ranks in rest:
            yield self._spread("replica", ranks)
        for axis, split, cut in zip(self.axes, self.layout.split, self.layout.cut, strict=True):
            if cut:
                yield Spread("shard", axis.name or "", axis.ranks, len(axis.ranks), self._partition_dim)
            elif not split and "attributes" in self.source:
                yield Spread("replica", axis.name or "", axis.ranks)

    def _spread(self, kind: str, ranks: Ranks, num_pieces: int = 1, dim: int | None = None) -> Spread:
        return Spread(kind, self.names.get(ranks, ""), ranks, num_pieces, dim)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, or the tensor itself."""
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    # In LocalTensorMode the program runs as if it were the lowest rank.
    return next(iter(ranks_of(local).values()), local).detach()


def dtensor_box(tensor: DTensor) -> Box | None:
    """Return the position of a DTensor's local tensor in the whole parameter.

    It is None if torch has not cut the tensor as expected.

    The engine does not use this function, because it counts pieces and does not need to know their elements.
    """
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    box = [(0, length) for length in tensor.shape]
    # Strided shards (FSDP2 over tensor parallelism) are cut from what the other axes have left, in any order of axes.
    for i in sorted(range(mesh.ndim), key=lambda i: type(tensor.placements[i]).__name__ == "_StridedShard"):
        placement = tensor.placements[i]
        if placement.is_replicate() or placement.is_partial():
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        first, count = box[dim]
        # torch cuts as in torch.chunk: all pieces have the same length, except the last ones.
        length = -(-count // mesh.size(i))
        start = min(length * coordinate[i], count)
        box[dim] = first + start, min(length, count - start)
    return tuple(box) if tuple(length for _, length in box) == tuple(local_tensor(tensor).shape) else None


def _find_slices(request: Request) -> dict[int, Slice]:
    """Return the position of every slice of a flattened parameter, by `id` of the tensor."""
    slices: dict[int, Slice] = {}
    for source in SOURCES:
        # FSDP1 without use_orig_params=True has a single flat parameter and no slices of it.
        with suppress(DistclipError):
            slices |= source.find_slices(request)
    return slices


def _find_sources(request: Request) -> dict[int, str]:
    """Return the title of the sources that recognize each tensor, by `id`."""
    titles: dict[int, list[str]] = {id(tensor): [] for _, tensor in request.tensors}
    for source in SOURCES:
        read = source.layout_reader(request)
        for name, tensor in request.tensors if read is not None else ():
            # A reader may fail on a tensor that an earlier source describes.
            with suppress(Exception):
                layout = read(name, tensor, None)  # type: ignore[misc]
                # Every plain tensor has a layout. Only its attributes show whether the source recognizes it.
                if layout is not None and (layout.groups or source.attributes & vars(tensor).keys()):
                    titles[id(tensor)].append(source.title)
    return {key: " + ".join(found) for key, found in titles.items()}


def _find_twins(named: Sequence[tuple[str, Tensor]]) -> dict[int, str]:
    """Return the name of an earlier tensor that a tensor overlaps in memory, by `id` of the later one."""
    extents: list[tuple[str, int, int, int]] = []
    for i, (_, tensor) in enumerate(named):
        local = local_tensor(tensor)
        has_memory = local.device.type != "meta" and not is_fake(local)
        if local.layout is torch.strided and local.numel() and has_memory and local.is_contiguous():
            start = local.data_ptr()
            extents.append((str(local.device), start, i, start + local.numel() * local.element_size()))
    twins: dict[int, str] = {}
    last = ("", 0, 0, 0)
    for extent in sorted(extents):
        if extent[0] == last[0] and extent[1] < last[3]:
            first, second = sorted((last[2], extent[2]))
            twins[id(named[second][1])] = named[first][0]
        else:
            last = extent
    return twins


def _read_lines(table: ShardTable) -> tuple[Line, ...]:
    """Return the mesh axes and process groups of more than one rank that this rank belongs to."""
    lines: dict[Line, None] = {}
    for tensor in table.tensors:
        if is_dtensor(tensor):
            mesh = tensor.device_mesh
            for i, name in enumerate(mesh.mesh_dim_names or ()):
                lines[name, tuple(dist.get_process_group_ranks(mesh.get_group(i)))] = None
    for axis in table.axes:
        lines[axis.name or "", axis.ranks] = None
    if dist.is_available() and dist.is_initialized():
        for group, ranks in distributed_c10d._world.pg_group_ranks.items():
            # torch keeps a placeholder for groups without this rank.
            # Our own groups are no axes of the program.
            if isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0 and group.group_desc != "distclip":
                lines[name_from_description(group) or "", tuple(sorted(ranks, key=ranks.__getitem__))] = None
    return tuple(line for line in lines if len(line[1]) > 1)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
