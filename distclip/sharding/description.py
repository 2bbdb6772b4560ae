"""Describe how the tensors of a rank are spread over the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..comm.ranks import Axis
from .layout import Layout

__all__ = ["describe_layouts"]


def describe_layouts(layouts: Iterable[Layout], axes: Sequence[Axis], num_ranks: int) -> str:
    """Return the layouts of this rank's parameters in one line.

    Args:
        layouts: one per parameter.
        axes: of `split_over=`.
        num_ranks: number of ranks of the all-reduce.

    >>> sharded, plain = Layout(((0, 1, 2, 3),), num_pieces=4), Layout()
    >>> describe_layouts([sharded] * 148 + [plain] * 2, [], 4)
    '148 tensors, 4 shards each; 2 plain tensors, assumed to be replicas; one all-reduce over 4 ranks'
    """
    counts = Counter(_describe_layout(layout, axes, num_ranks) for layout in layouts)
    parts = [f"{count:,} {kind.replace('tensors', 'tensor') if count == 1 else kind}" for kind, count in counts.items()]
    if axes:
        parts.append(f"split over {', '.join(axis.name or 'a group' for axis in axes)}")
    parts.append(f"one all-reduce over {num_ranks:,} ranks" if num_ranks > 1 else "no communication")
    return "; ".join(parts)


def _describe_layout(layout: Layout, axes: Sequence[Axis], num_ranks: int) -> str:
    """Return the layout of one parameter in words."""
    if not layout.groups:
        if num_ranks == 1:
            return "tensors"
        different = [axis.name or "a group" for axis, split in zip(axes, layout.split, strict=False) if split]
        if different:
            return f"plain tensors, different ones along {', '.join(different)}"
        return "plain tensors, assumed to be replicas"
    if layout.is_averaged:
        return f"tensors, averaged by DDP over {layout.num_members} ranks"
    replicas = layout.num_members // max(1, layout.num_pieces)
    shards = f"{layout.num_pieces} shards each" if layout.num_pieces > 1 else ""
    copies = f"{replicas} replicas {'of each shard' if shards else 'each'}" if replicas > 1 else ""
    return "tensors, " + (" and ".join(filter(None, (shards, copies))) or "whole")
