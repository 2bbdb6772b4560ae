"""`Layout`: where a parameter lies across ranks, and how many ranks hold the same piece of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..comm.ranks import Axis, Ranks

__all__ = ["Layout", "num_replicas"]


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


def num_replicas(world_size: int, layout: Layout, axes: Sequence[Axis]) -> float:
    r"""How many ranks of the communicator hold the same piece as this one.

    .. math:: copies = \frac{N}{pieces \cdot \prod_{a\ split} |a| / |a \cap members|}

    A parameter is taken as replicated over everything that neither its placements nor `split_over=` speaks of.
    An axis of `split_over=` that lies inside of the parameter's own mesh splits nothing further.

    Args:
        world_size: N, ranks of the communicator.
        layout: of the parameter.
        axes: of `split_over=`.

    >>> stage = Axis((0, 2), "pp")
    >>> num_replicas(4, Layout(groups=((0, 1),), pieces=2, split=(True,)), [stage])  # FSDP2 inside of a stage
    1.0
    >>> num_replicas(4, Layout(split=(True,)), [stage])  # a plain tensor of a stage, replicated over two ranks
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
