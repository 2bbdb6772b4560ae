"""Find the units whose gradients arrive together: a tensor, or the tensors of one FSDP2 group or of one DDP bucket."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Comm
from ..comm.agreement import zero_sum_weight
from ..devices import accumulation_dtype
from ..errors import LayoutError
from ..norms.kernels import power_sums
from ..norms.memory import read_gradients
from ..norms.message import check_bits
from ..sharding.fsdp2 import param_groups
from ..sharding.shard import Shards
from ..sharding.table import ShardTable

__all__ = ["Unit", "Units"]


@dataclass(eq=False)
class Unit:
    """Parameters whose gradients arrive together, and are clipped and stepped together.

    Args:
        name: name of the unit, equal on every rank.
        params: parameters of this rank.
        table: table of these parameters.
        slots: measured slots of the unit on all ranks, in the order in which they are clipped.
        needs_sum: whether the norms of its gradients need a sum over ranks.
        is_managed: whether a framework makes these gradients at the same point on all ranks, so that a rank may wait
            for the others.
    """

    name: str
    params: list[Tensor]
    table: ShardTable
    slots: tuple[int, ...]
    needs_sum: bool
    is_managed: bool

    def measure(self) -> tuple[Shards, dict[int, float]]:
        """Return this rank's gradients, and their squared norms by slot.

        The squared norms are divided by the number of replicas if the ranks add them up.

        Raises:
            LayoutError: a gradient is partial, or cannot be read.

        Collectives: none. Host syncs: one on an accelerator.
        """
        shards = read_gradients(self.table)
        if shards.infos.whole[2]:
            raise LayoutError(
                f"{shards[shards.infos.whole[2][0]].name} has a partial gradient, which needs a sum over ranks before "
                "it can be clipped within backward. Redistribute it to Replicate() or Shard(dim) first."
            )
        device = shards.grads[0].device if shards.grads else self.table.device
        sums, _, _ = power_sums(shards.grads, 2.0, device, shards.description)
        powers: dict[int, float] = {}
        for info, power in zip(shards.infos, sums.tolist(), strict=True):
            # Without a sum over ranks, one replica counts for all replicas.
            powers[info.slot] = powers.get(info.slot, 0.0) + power / (info.num_replicas if self.needs_sum else 1.0)
        return shards, powers


class Units:
    """The units of a clipper's parameters.

    Args:
        table: parameters of this rank, with a slot for each.
        comm: communicator of all ranks involved.
        averaged: ids of the parameters whose gradients DDP averages. They come in buckets, see `bucket`.
    """

    def __init__(self, table: ShardTable, comm: Comm, averaged: frozenset[int]) -> None:
        self._table, self._comm, self._averaged = table, comm, averaged
        self._positions = {id(tensor): i for i, tensor in enumerate(table.tensors) if tensor.requires_grad}
        self._slots = [info.slot for info in table.metadata.infos(table.holders)]
        self._buckets: dict[tuple[int, ...], Unit] = {}
        self.all: list[Unit] = []
        self.by_param: dict[int, Unit] = {}

    def describe(self) -> tuple[list[tuple[str, tuple[int, ...]]], dict[int, int]]:
        """Return the name and the slots of each unit of this rank, and the number of elements of each slot."""
        named = []
        for params, _ in self._partition():
            named.append((self._name(params), tuple(sorted({self._slot(param) for param in params}, reverse=True))))
        sizes: dict[int, int] = {}
        for i in self._positions.values():
            sizes[self._slots[i]] = max(self._table.tensors[i].numel(), sizes.get(self._slots[i], 0))
        return named, sizes

    def build(self, gathered: Sequence[Sequence[tuple[str, tuple[int, ...]]]]) -> None:
        """Build the units, which must be the same on all ranks.

        Args:
            gathered: names and slots of the units of every rank.

        Raises:
            LayoutError: some rank has other units. It is raised on every rank.
        """
        names = [sorted(name for name, _ in units) for units in gathered]
        if any(other != names[0] for other in names):
            odd = next(other for other in names if other != names[0])
            different = sorted({*odd} ^ {*names[0]})
            raise LayoutError(
                f"in_backward: the ranks have different parameters ({', '.join(different[:3])} …), so that their "
                "backwards have no common order. Pipeline stages and experts under different names cannot be stepped "
                "within backward. Use clipper.step(optimizer) for them."
            )
        slots: dict[str, set[int]] = {}
        for units in gathered:
            for name, own in units:
                slots.setdefault(name, set()).update(own)
        for params, is_managed in self._partition():
            # Backward mostly runs in the reverse order of the table.
            ordered = tuple(sorted(slots[self._name(params)], reverse=True))
            unit = Unit(self._name(params), params, self._subtable(params), ordered, self._comm.size > 1, is_managed)
            self.all.append(unit)
            self.by_param |= {id(param): unit for param in params}

    @property
    def message_size(self) -> int:
        """Length of the message of a unit, the same for all units and ranks."""
        return max((len(unit.slots) for unit in self.all), default=0) + 1

    def message(self, unit: Unit | None, powers: dict[int, float]) -> Tensor:
        """Return the message of a unit, or one that stands for no unit.

        The last number is a weighted checksum of the unit. Its sum over ranks is 0 if all ranks send the same unit.
        """
        buffer = [0.0] * self.message_size
        name = ""
        if unit is not None:
            name = unit.name
            for i, slot in enumerate(unit.slots):
                buffer[i] = powers.get(slot, 0.0)
        device = self._comm.device or torch.device("cpu")
        dtype = accumulation_dtype(device)
        checksum = zlib.crc32(name.encode()) % 2 ** check_bits(dtype, self._comm.size)
        buffer[-1] = checksum * zero_sum_weight(self._comm.rank, self._comm.size)
        return torch.tensor(buffer, dtype=dtype, device=device)

    def bucket(self, params: Sequence[Tensor]) -> Unit:
        """Return the unit of a DDP bucket, whose gradients are the same on all ranks."""
        own = [param for param in params if id(param) in self._positions]
        key = tuple(map(id, own))
        if key not in self._buckets:
            # A new unit is rare, because DDP rebuilds its buckets only once.
            slots = tuple(sorted({self._slot(param) for param in own}, reverse=True))
            self._buckets[key] = Unit("", own, self._subtable(own), slots, False, True)
        return self._buckets[key]

    def has(self, param: Tensor) -> bool:
        """Return whether a parameter trains."""
        return id(param) in self._positions

    def _partition(self) -> list[tuple[list[Tensor], bool]]:
        """Return the parameters of each unit, and whether FSDP2 makes their gradients together."""
        ids = set(self._positions) - self._averaged
        parts: list[tuple[list[Tensor], bool]] = []
        for group in param_groups(ids):
            params = [param.sharded_param for param in group.fsdp_params if id(param.sharded_param) in ids]
            ids.difference_update(map(id, params))
            parts.append((params, True))
        singles = [[tensor] for tensor in self._table.tensors if id(tensor) in ids]
        return parts + [(params, False) for params in singles]

    def _name(self, params: Sequence[Tensor]) -> str:
        return ", ".join(self._table.names[self._positions[id(param)]] for param in params)

    def _slot(self, param: Tensor) -> int:
        return self._slots[self._positions[id(param)]]

    def _subtable(self, params: Sequence[Tensor]) -> ShardTable:
        metadata = self._table.metadata.at([self._positions[id(param)] for param in params])
        table = ShardTable(list(params), metadata)
        table.holders = self._table.holders
        return table
