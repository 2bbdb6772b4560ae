"""The nouns about place: `Layout` (where a parameter lies across ranks), `Shard` (what of its gradient lies here),
`Rows` (which rows of the parameter that is).

What of a shard stays the same from one step to the next is its `Place`. A model has thousands of shards, so `Shards`
keeps their places, made once, beside the list of gradients of the moment.

After a source has made them, no code asks about DDP, FSDP, tensor, pipeline or expert parallelism again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from ..comm.ranks import Ranks

__all__ = ["PartialSum", "Rows", "Shard", "ShardInfo", "ShardInfos", "Shards", "stored_values"]


@dataclass(frozen=True, slots=True)
class PartialSum:
    """A sum over `group` that a gradient still waits for (a Partial placement).

    Args:
        ranks: who holds a summand.
        group: their process group.
        axis: which axis of its mesh that is. Sums are made axis by axis: ranks that took them in another order would
            add up sums with summands.
        mean: divide by the number of ranks afterwards (Partial("avg")).
    """

    ranks: Ranks
    group: torch.distributed.ProcessGroup
    axis: int
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows (places along dim 0) of its parameter a local piece holds.

    Args:
        first: the first of them.
        count: how many it touches.
        lead: elements of the first row that lie on other ranks, where a flattened parameter was cut anywhere.
        width: elements of a row, where a flattened parameter was cut; 0 where the piece has the rows as its dim 0.
    """

    first: int
    count: int
    lead: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """This rank's piece of one gradient.

    Args:
        name: of the parameter, the same on all ranks of its mesh.
        grad: the local tensor, of any floating or complex dtype and any shape: what is scaled in place.
        copies: how many ranks of the communicator hold this same piece, > 0; infinite for a copy that does
            not count. Each of them adds power_sum / copies.
        pending: sums to make before the piece can be measured.
        slot: the slot that it is counted in, or that its row 0 would be.
        rows: which rows it holds, each with a slot of its own; None where all of it is one slot.
    """

    name: str
    grad: Tensor
    num_replicas: float = 1.0
    partial_sums: tuple[PartialSum, ...] = field(default=())
    slot: int = 0
    rows: Rows | None = None

    @property
    def place(self) -> ShardInfo:
        """All but the gradient."""
        return ShardInfo(self.name, self.num_replicas, self.partial_sums, self.slot, self.rows)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard without its gradient: see `Shard`."""

    name: str
    num_replicas: float = 1.0
    partial_sums: tuple[PartialSum, ...] = ()
    slot: int = 0
    rows: Rows | None = None


class ShardInfos(tuple[ShardInfo, ...]):
    """Places of a rank's shards, and what follows from them alone."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(place.name for place in self)

    @cached_property
    def whole(self) -> tuple[ShardInfos, tuple[int, ...], tuple[int, ...]]:
        """Those that can be measured as they are and count in one slot: their places, their positions, and those of
        the others."""
        fit = [not place.partial_sums and place.rows is None for place in self]
        chosen = tuple(i for i, fits in enumerate(fit) if fits)
        others = tuple(i for i, fits in enumerate(fit) if not fits)
        return (ShardInfos(self[i] for i in chosen) if others else self), chosen, others

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """In which each of them counts."""
        return tuple(place.slot for place in self)

    def by_slot(self, slots: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Their positions ordered by slot, and how many there are in each of `slots`."""
        if self._by_slot is None:
            counts = Counter(self.slots)
            order = tuple(sorted(range(len(self)), key=self.slots.__getitem__))
            self._by_slot = order, tuple(counts[slot] for slot in range(slots))
        return self._by_slot

    _by_slot: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @cached_property
    def num_replicas(self) -> tuple[float, ...]:
        """Of each of them; empty where there is one of everything."""
        return () if all(place.num_replicas == 1 for place in self) else tuple(place.num_replicas for place in self)


class Shards(Sequence[Shard]):
    """This rank's pieces of all gradients of one moment.

    Args:
        places: of each.
        grads: the local tensors, in the same order.
        merged: the same elements in fewer pieces, for whoever only wants to know what all have together.

    >>> shards = Shards(ShardInfos([ShardInfo("w", num_replicas=2.0)]), [torch.ones(3)])
    >>> shards[0].name, shards[0].num_replicas, len(shards)
    ('w', 2.0, 1)
    """

    __slots__ = ("grads", "merged", "places")

    def __init__(self, places: ShardInfos, grads: list[Tensor], merged: Shards | None = None) -> None:
        self.places, self.grads, self.merged = places, grads, merged

    @property
    def infos(self) -> ShardInfos:
        """Metadata of the shards."""
        return self.places

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Shards:
        """The same shards, if they are not of this class already."""
        if isinstance(shards, Shards):
            return shards
        listed = list(shards)
        return cls(ShardInfos(shard.place for shard in listed), [shard.grad for shard in listed])

    def where(self, chosen: Sequence[int]) -> Shards:
        """Those at some positions."""
        return Shards(ShardInfos(self.places[i] for i in chosen), [self.grads[i] for i in chosen])

    @overload
    def __getitem__(self, i: int) -> Shard: ...
    @overload
    def __getitem__(self, i: slice) -> Shards: ...
    def __getitem__(self, i: int | slice) -> Shard | Shards:
        if isinstance(i, slice):
            return Shards(ShardInfos(self.places[i]), self.grads[i])
        place = self.places[i]
        return Shard(place.name, self.grads[i], place.num_replicas, place.partial_sums, place.slot, place.rows)

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self.grads)))

    def __len__(self) -> int:
        return len(self.grads)


def stored_values(grad: Tensor) -> Tensor:
    """Return the stored elements of a local gradient, as a dense tensor that shares its memory.

    Args:
        grad: dense or sparse, of any shape and dtype.

    >>> stored_values(torch.tensor([0.0, 2.0]).to_sparse())
    tensor([2.])
    """
    if grad.is_sparse:
        return grad._values()
    return grad if grad.layout is torch.strided else grad.values()
