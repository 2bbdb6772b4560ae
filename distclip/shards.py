"""The nouns about place: `Layout` (where a parameter lies across ranks), `Shard` (what of its gradient lies here),
`Rows` (which rows of the parameter that is).

After a source has made them, no code asks about DDP, FSDP, tensor, pipeline or expert parallelism again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Axis", "Layout", "Pending", "Ranks", "Rows", "Shard", "copies"]

Ranks = tuple[int, ...]
"""Global ranks, in the order of their process group."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of `split_over=`: the ranks along it, this one among them, hold different parameters.

    Args:
        ranks: the global ranks along the axis, through this rank.
        name: what the axis is called ("pp", "tp" ...), None where nobody named it.
        identity: the same text on all of `ranks` and on no other group of ranks.
    """

    ranks: Ranks
    name: str | None = None
    identity: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'an unnamed group'} over ranks {list(self.ranks)}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one parameter lies across ranks, as far as it or its owner says so.

    Args:
        groups: the ranks of each mesh or process group that it spans. Empty for a plain tensor: nothing is said.
        pieces: into how many different pieces it is cut within those groups together.
        split: for each axis of `split_over=`, whether the axis holds different tensors for it.
        cut: for each of them, whether these are pieces of one parameter; otherwise they are different parameters.
        counted: False for a copy that its owner declared not to count (Megatron's `shared`).
        may_be_partial: whether its gradient may come as unreduced summands (a Partial placement).
    """

    groups: tuple[Ranks, ...] = ()
    pieces: int = 1
    split: tuple[bool, ...] = ()
    cut: tuple[bool, ...] = ()
    counted: bool = True
    may_be_partial: bool = False

    @property
    def members(self) -> frozenset[int]:
        """Every rank that the parameter is known to span."""
        return frozenset(rank for ranks in self.groups for rank in ranks)


@dataclass(frozen=True, slots=True)
class Pending:
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
    copies: float = 1.0
    pending: tuple[Pending, ...] = field(default=())
    slot: int = 0
    rows: Rows | None = None


def copies(world_size: int, layout: Layout, axes: Sequence[Axis]) -> float:
    r"""How many ranks of the communicator hold the same piece as this one.

    .. math:: copies = \frac{N}{pieces \cdot \prod_{a\ split} |a| / |a \cap members|}

    A parameter is taken as replicated over everything that neither its placements nor `split_over=` speaks of.
    An axis of `split_over=` that lies inside of the parameter's own mesh splits nothing further.

    Args:
        world_size: N, ranks of the communicator.
        layout: of the parameter.
        axes: of `split_over=`.

    >>> stage = Axis((0, 2), "pp")
    >>> copies(4, Layout(groups=((0, 1),), pieces=2, split=(True,)), [stage])  # FSDP2 inside of a stage
    1.0
    >>> copies(4, Layout(split=(True,)), [stage])  # a plain tensor of a stage, replicated over two ranks
    2.0
    """
    if not layout.counted:
        return math.inf
    count = world_size / layout.pieces
    members = layout.members
    for axis, split in zip(axes, layout.split, strict=True):
        if split:
            count *= max(1, len(members.intersection(axis.ranks))) / len(axis.ranks)
    return count
