"""Define groups of ranks: `Ranks`, and the named `Axis` of `split_over=`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "Ranks", "is_tensor_axis", "rank_list"]

Ranks = tuple[int, ...]
"""Global ranks, in the order of their process group."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of `split_over=`: the ranks along it, this rank among them, hold different parameters.

    Args:
        ranks: the global ranks along the axis, through this rank.
        name: name of the axis ("pp", "tp" ...), or None if the caller gave none.
        identity: text that is equal on all of `ranks`, and on no other group of ranks.
    """

    ranks: Ranks
    name: str | None = None
    identity: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'an unnamed group'} over ranks {list(self.ranks)}"


def is_tensor_axis(name: str | None) -> bool:
    """Return whether the name of an axis is one of tensor parallelism.

    >>> is_tensor_axis("tp"), is_tensor_axis("tensor_model_parallel"), is_tensor_axis("pp"), is_tensor_axis(None)
    (True, True, False, False)
    """
    return name is not None and (name == "tp" or "tensor" in name)


def rank_list(ranks: Sequence[int]) -> str:
    """Return the first ranks as text, for messages.

    >>> rank_list([3]), rank_list(range(10))
    ('rank 3', 'ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more')
    """
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"
