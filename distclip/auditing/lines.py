"""Find the mesh axis along which ranks differ, for the line of code that fixes a mistake."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from ..comm.ranks import Ranks
from .facts import Facts
from .words import describe_ranks

__all__ = ["AxisLines", "axis_lines", "find_axis"]


@dataclass(frozen=True, slots=True)
class AxisLines:
    """A mesh axis, or process groups of one kind, over some ranks.

    Args:
        name: name of the axis, or "".
        lines: ranks along the axis, for each line of it.
    """

    name: str
    lines: tuple[Ranks, ...]

    def code(self, placeholder: str) -> str:
        """Return the Python expression for the axis."""
        return f'mesh["{self.name or placeholder}"]'

    def __str__(self) -> str:
        lines = " and of ".join(f"ranks {describe_ranks(line)}" for line in self.lines[:3])
        return f"the axis of {lines}{' and so on' if len(self.lines) > 3 else ''}"


def axis_lines(by_rank: Mapping[int, Facts]) -> list[AxisLines]:
    """List the axes and process groups that cut all ranks into lines of equal length."""
    lines: dict[tuple[str, int], set[Ranks]] = {}
    for facts in by_rank.values():
        for name, ranks in facts.lines:
            lines.setdefault((name, len(ranks)), set()).add(ranks)
    return [AxisLines(name, tuple(sorted(group))) for (name, _), group in lines.items()]


def find_axis(
    axes: Collection[AxisLines],
    ranks: Collection[int],
    along: Callable[[int, int], bool],
    across: Callable[[int, int], bool],
    preferred: Collection[str] = (),
) -> AxisLines | None:
    """Find an axis where ranks on one line fit `along`, and ranks on different lines fit `across`.

    Args:
        axes: candidates.
        ranks: ranks that must be on the axis.
        along: returns whether two ranks can be on one line.
        across: returns whether two ranks can be at one position of different lines.
        preferred: patterns of names, the best first.
    """
    fitting = []
    for axis in axes:
        for lines in _partitions(axis.lines, frozenset(ranks)):
            inside = (pair for line in lines for pair in itertools.combinations(sorted(set(line) & set(ranks)), 2))
            across_lines = (
                (one[i], two[i])
                for one, two in itertools.combinations(lines, 2)
                for i in range(min(len(one), len(two)))
                if one[i] in ranks and two[i] in ranks
            )
            if all(along(*pair) for pair in inside) and all(across(*pair) for pair in across_lines):
                fitting.append(AxisLines(axis.name, lines))
    patterns = list(preferred)

    def order(axis: AxisLines) -> tuple[int, int, str]:
        position = next((i for i, pattern in enumerate(patterns) if re.search(pattern, axis.name)), len(patterns))
        # A name is better than none, and the widest axis explains most.
        return (position if axis.name else len(patterns) + 1, -len(axis.lines[0]), axis.name)

    return min(fitting, key=order, default=None)


def _partitions(lines: tuple[Ranks, ...], ranks: frozenset[int]) -> Iterator[tuple[Ranks, ...]]:
    """Yield sets of disjoint lines that together contain all ranks."""
    # A program can have several meshes with an axis of this name. A line that overlaps another one belongs to another
    # mesh.
    chosen: list[Ranks] = []
    for first in lines:
        chosen = [first]
        for line in lines:
            if not any(set(line) & set(other) for other in chosen):
                chosen.append(line)
        if ranks <= {rank for line in chosen for rank in line} and first == min(chosen):
            yield tuple(sorted(line for line in chosen if ranks.intersection(line)))
