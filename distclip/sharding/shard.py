"""Define `Shard`, this rank's part of one gradient, and `Shards`, all of them at one moment.

Everything except the gradients stays the same from one step to the next. A model has thousands of shards, so `Shards`
keeps this metadata in `ShardInfos`, which is made once, next to a list of the current gradients. No stage after this
package depends on DDP, FSDP, tensor, pipeline or expert parallelism.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..comm.ranks import Ranks
from ..devices import Numbers
from .replicas import ReplicaGroup

__all__ = [
    "PartialSum",
    "Rows",
    "Shard",
    "ShardInfo",
    "ShardInfos",
    "Shards",
    "coalesce_",
    "element_values",
    "stored_values",
]


@dataclass(frozen=True, slots=True)
class PartialSum:
    """Sum over a process group that a partial gradient still needs (a Partial placement).

    Args:
        ranks: global ranks that hold a summand.
        group_name: name of their process group. The name can be pickled and sent to other ranks, which the group
            cannot.
        axis: index of the mesh axis, negative for an axis of an annotation. Gradients are summed axis by axis, because
            ranks that took the axes in different orders would mix sums with summands.
        mean: True to divide by the number of ranks afterwards (Partial("avg")).
    """

    ranks: Ranks
    group_name: str
    axis: int
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows (indices along dim 0) of a parameter that a local tensor holds.

    Args:
        first: index of the first row.
        count: number of rows, the first and the last of which can be incomplete in a slice.
        lead: in a slice of a flattened parameter, number of elements of the first row that other ranks hold.
        width: in a slice of a flattened parameter, number of elements in a row. 0 if the rows are dim 0 of the tensor.
    """

    first: int
    count: int
    lead: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Metadata of a shard, without its gradient. See `Shard` for the arguments."""

    name: str
    num_replicas: float = 1.0
    partial_sums: tuple[PartialSum, ...] = ()
    slot: int = 0
    rows: Rows | None = None
    replicas: tuple[ReplicaGroup, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Part of one gradient that this rank holds.

    Args:
        name: name of the parameter, equal on all ranks of its mesh.
        grad: the local tensor, of any floating or complex dtype and any shape. It is scaled in place.
        num_replicas: number of ranks of the communicator that hold this same shard, > 0. Infinite for a replica that
            does not count. Every replica adds power_sum / num_replicas.
        partial_sums: sums that the gradient needs before it can be measured.
        slot: index of the norm that the shard counts in. If every row has a slot, that of row 0 of the parameter.
        rows: rows that the shard holds, if every row has a slot. None if the whole shard counts in one slot.
        replicas: groups of ranks that hold this same shard, this rank among them, as far as they are known.
    """

    name: str
    grad: Tensor
    num_replicas: float = 1.0
    partial_sums: tuple[PartialSum, ...] = ()
    slot: int = 0
    rows: Rows | None = None
    replicas: tuple[ReplicaGroup, ...] = ()

    @property
    def info(self) -> ShardInfo:
        """Metadata of the shard, without the gradient."""
        return ShardInfo(self.name, self.num_replicas, self.partial_sums, self.slot, self.rows, self.replicas)


class SlotOrder(NamedTuple):
    """Order of shards none of which shares a slot with another.

    Args:
        first_slots: slot of the first row of each shard that counts by row.
        names: of the parameters, in the order of their slots.
        counts: number of slots of each.
    """

    first_slots: array[int]
    names: tuple[str, ...]
    counts: tuple[int, ...]


class ShardInfos(tuple[ShardInfo, ...]):
    """Metadata of all shards of a rank, with columns that are computed once."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each shard's parameter."""
        return tuple(info.name for info in self)

    @cached_property
    def slots(self) -> Numbers[int]:
        """Slot of each shard."""
        return Numbers(info.slot for info in self)

    @cached_property
    def num_replicas(self) -> Numbers[float]:
        """Number of replicas of each shard, or empty if all shards have one replica."""
        return Numbers(() if all(info.num_replicas == 1 for info in self) else (info.num_replicas for info in self))

    @cached_property
    def whole(self) -> tuple[ShardInfos, tuple[int, ...], tuple[int, ...]]:
        """Metadata and positions of the shards that count in one slot each, and positions of all others.

        The others count by row, or are partial gradients that need a sum first.
        """
        is_whole = [not info.partial_sums and info.rows is None for info in self]
        whole = tuple(i for i, yes in enumerate(is_whole) if yes)
        others = tuple(i for i, yes in enumerate(is_whole) if not yes)
        # Usually there are no others, and the columns of `self` are shared.
        return (ShardInfos(self[i] for i in whole) if others else self), whole, others

    @cached_property
    def by_row(self) -> tuple[ShardInfos, tuple[int, ...]]:
        """Metadata and positions of the shards whose rows have a slot each, except partial gradients."""
        positions = tuple(i for i in self.whole[2] if not self[i].partial_sums)
        return ShardInfos(self[i] for i in positions), positions

    @cached_property
    def rows(self) -> tuple[Rows, ...]:
        """Rows of each shard, for shards `by_row`."""
        return tuple(info.rows for info in self if info.rows is not None)

    @cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Number of rows of each shard, for shards `by_row`."""
        return tuple(rows.count for rows in self.rows)

    @property
    def row_slots(self) -> Tensor:
        """Slot of each row of each shard, (rows,) int64 on a CPU."""
        if self._row_slots is None:
            pairs = [(info.slot + info.rows.first, info.rows.count) for info in self if info.rows is not None]
            with torch.utils._python_dispatch._disable_current_modes():
                # A tensor that is made under a dispatch mode must not be used outside of it, so the modes are disabled.
                self._row_slots = torch.cat([torch.arange(first, first + count) for first, count in pairs])
        return self._row_slots

    _row_slots: Tensor | None = None

    def slot_order(self, num_slots: int) -> SlotOrder | None:
        """Return the order of the shards by slot.

        Args:
            num_slots: number of slots.

        Returns:
            None if a slot has no summand, or several. The summands are the shards in `whole` and the rows in `by_row`.
        """
        # Computed once, see `by_slot`.
        if self._slot_order is None:
            whole, (by_row, _) = self.whole[0], self.by_row
            rows = [(info.slot + info.rows.first, info.rows.count, info.name) for info in by_row if info.rows]
            ordered = sorted([*((info.slot, 1, info.name) for info in whole), *rows])
            ends = itertools.accumulate(count for _, count, _ in ordered)
            is_filled = [first for first, _, _ in ordered] + [num_slots] == [0, *ends]
            order = SlotOrder(
                array("q", [first for first, _, _ in rows]),
                tuple(name for _, _, name in ordered),
                tuple(count for _, count, _ in ordered),
            )
            self._slot_order = (order if is_filled else None,)
        return self._slot_order[0]

    _slot_order: tuple[SlotOrder | None] | None = None

    @cached_property
    def by_replica_group(self) -> dict[ReplicaGroup, tuple[int, ...]]:
        """Positions of the shards that each replica group holds. A partial gradient has no replicas yet."""
        positions: dict[ReplicaGroup, list[int]] = {}
        for i, info in enumerate(self):
            for group in () if info.partial_sums else info.replicas:
                positions.setdefault(group, []).append(i)
        return {group: tuple(members) for group, members in positions.items()}

    def by_slot(self, num_slots: int) -> tuple[Numbers[int], Numbers[int]]:
        """Return the positions of all shards ordered by slot, and the number of shards in each slot."""
        # Computed once: the number of slots is fixed when a clipper is made.
        if self._by_slot is None:
            counts = Counter(self.slots)
            order = Numbers(sorted(range(len(self)), key=self.slots.__getitem__))
            self._by_slot = order, Numbers(counts[slot] for slot in range(num_slots))
        return self._by_slot

    _by_slot: tuple[Numbers[int], Numbers[int]] | None = None

    followed_by: tuple[ShardInfos, int, ShardInfos] | None = None
    """Other metadata, the first slot of it, and both together, see `Shards.followed_by`."""

    in_memory: Any = None
    """Facts that `norms.memory` keeps about the memory of these shards for the next step."""


class Shards(Sequence[Shard]):
    """All shards of one rank at one moment.

    Args:
        infos: metadata of each shard.
        grads: local tensors, in the same order.
        merged: the same elements in fewer, larger tensors, which are read if only the total norm is needed.

    Attributes:
        description: table of the gradients in memory for the kernels, or None.

    >>> shards = Shards(ShardInfos([ShardInfo("w", num_replicas=2.0)]), [torch.ones(3)])
    >>> shards[0].name, shards[0].num_replicas, len(shards)
    ('w', 2.0, 1)
    """

    __slots__ = ("description", "grads", "infos", "merged")

    def __init__(self, infos: ShardInfos, grads: list[Tensor], merged: Shards | None = None) -> None:
        self.infos, self.grads, self.merged = infos, grads, merged
        self.description: Any = None

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Shards:
        """Collect shards from an iterable."""
        shards = list(shards)
        return cls(ShardInfos(shard.info for shard in shards), [shard.grad for shard in shards])

    def followed_by(self, others: Shards, first_slot: int) -> Shards:
        """Return these shards and then others.

        Args:
            others: further shards. Their slots are shifted by `first_slot`, and their replicas are left out.
            first_slot: number of slots of these shards.
        """
        known = self.infos.followed_by
        # Usually every step has the same metadata.
        if known is None or known[0] is not others.infos or known[1] != first_slot:
            shifted = (replace(info, slot=info.slot + first_slot, replicas=()) for info in others.infos)
            known = self.infos.followed_by = others.infos, first_slot, ShardInfos((*self.infos, *shifted))
        return Shards(known[2], [*self.grads, *others.grads])

    def where(self, positions: Sequence[int]) -> Shards:
        """Return the shards at some positions."""
        return Shards(ShardInfos(self.infos[i] for i in positions), [self.grads[i] for i in positions])

    @overload
    def __getitem__(self, i: int) -> Shard: ...
    @overload
    def __getitem__(self, i: slice) -> Shards: ...
    def __getitem__(self, i: int | slice) -> Shard | Shards:
        if isinstance(i, slice):
            return Shards(ShardInfos(self.infos[i]), self.grads[i])
        info = self.infos[i]
        columns = info.num_replicas, info.partial_sums, info.slot, info.rows, info.replicas
        return Shard(info.name, self.grads[i], *columns)

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self.grads)))

    def __len__(self) -> int:
        return len(self.grads)


def element_values(grad: Tensor) -> Tensor:
    """Return the elements of a local gradient that are not implicit zeros, each of them once.

    Args:
        grad: see `stored_values`. A sparse gradient may store an element as several summands.

    >>> element_values(torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True))
    tensor([3.])
    """
    return stored_values(grad.coalesce() if grad.is_sparse else grad)


def coalesce_(grads: Iterable[Tensor]) -> None:
    """Sum the summands of each element of sparse gradients, in place."""
    for grad in grads:
        if grad.is_sparse and not grad.is_coalesced():
            # Inference mode is off here, because the program could not write to inference tensors later.
            with torch.inference_mode(False), torch.no_grad():
                grad.copy_(grad.coalesce())


def stored_values(grad: Tensor) -> Tensor:
    """Return the stored values of a local gradient, as a dense tensor that shares its memory.

    The values are its elements, or (sparse and not coalesced) summands of elements.

    Args:
        grad: dense or sparse, of any shape and dtype.

    >>> stored_values(torch.tensor([0.0, 2.0]).to_sparse())
    tensor([2.])
    """
    if grad.is_sparse:
        return grad._values()
    return grad if grad.layout is torch.strided else grad.values()
