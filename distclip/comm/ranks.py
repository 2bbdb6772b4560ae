"""Groups of ranks: `Ranks`, and the named `Axis` of `split_over=`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Axis", "Ranks"]

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
