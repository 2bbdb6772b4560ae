"""Define groups of ranks: `Ranks`, and the named `Axis` of `split_over=`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Axis", "Ranks"]

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
