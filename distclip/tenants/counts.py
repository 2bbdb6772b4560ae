"""Count the steps of many groups in columns, so that a step without a skip runs no Python per group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add

__all__ = ["GroupCounters", "GroupCounts"]


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """Counters of one group.

    Args:
        steps: number of steps in which the group had a gradient.
        skipped: number of these steps that were skipped.
        in_a_row: number of steps skipped since the last one that was not.
    """

    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0


class GroupCounters:
    """Counters of all groups, in the order of their slots.

    Args:
        names: names of the groups.

    Attributes:
        columns: steps, skipped steps and skipped steps in a row of every group. Steps replace the lists and never
            modify them, so `columns` can be kept and restored.

    >>> counters = GroupCounters(["a", "b"])
    >>> counters.record([True, True], [False, True])
    [1]
    >>> counters["b"]
    GroupCounts(steps=1, skipped=1, in_a_row=1)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._slots = {name: slot for slot, name in enumerate(names)}
        zeros = [0] * len(self._slots)
        self.columns: tuple[list[int], list[int], list[int]] = (zeros, zeros, zeros)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __getitem__(self, name: str) -> GroupCounts:
        slot = self._slots[name]
        return GroupCounts(*(column[slot] for column in self.columns))

    def __setitem__(self, name: str, counts: GroupCounts) -> None:
        slot, values = self._slots[name], (counts.steps, counts.skipped, counts.in_a_row)
        one, two, three = ([*old[:slot], new, *old[slot + 1 :]] for old, new in zip(self.columns, values, strict=True))
        self.columns = one, two, three

    def record(self, are_present: Sequence[bool], are_skipped: Sequence[bool]) -> list[int]:
        """Count one step.

        Args:
            are_present: for each group, whether it has a gradient. The other groups take no part in the step.
            are_skipped: for each group, whether it skips the step.

        Returns:
            The slots of the groups that take part in the step and skip it.
        """
        steps, skipped, in_a_row = self.columns
        steps = list(map(add, steps, are_present))
        found = [slot for slot, is_skipped in enumerate(are_skipped) if is_skipped and are_present[slot]]
        if found or any(in_a_row):
            in_a_row = [0 if is_present else old for old, is_present in zip(in_a_row, are_present, strict=True)]
            skipped = list(skipped)
            for slot in found:
                skipped[slot] += 1
                in_a_row[slot] = self.columns[2][slot] + 1
        self.columns = steps, skipped, in_a_row
        return found
