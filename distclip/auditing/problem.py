"""Define `Problem`: a mistake in the description of a layout, with the line that fixes it."""

from __future__ import annotations

from dataclasses import dataclass

from ..comm.ranks import Ranks

__all__ = ["Findings", "Problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake that `audit` has found.

    Args:
        kind: name of the mistake, for example "missing split_over".
        message: what is wrong, with the numbers that prove it.
        fix: what to do, with the line of code.
        parameters: names of the parameters concerned.
        ranks: global ranks concerned.
    """

    kind: str
    message: str
    fix: str
    parameters: tuple[str, ...] = ()
    ranks: Ranks = ()

    @property
    def concerns_layout(self) -> bool:
        """True if ranks, layouts or arguments are described wrongly, and not the optimizer."""
        return not self.kind.startswith(("optimizer", "stepped", "tied by memory"))

    def __str__(self) -> str:
        return f"{self.kind}: {self.message} {self.fix}"


class Findings:
    """Problems and notes, in the order in which they were found.

    A parameter is reported once: the first problem explains the numbers that later checks would report again.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.explained: set[str] = set()

    def add(self, problem: Problem) -> None:
        """Add a problem."""
        self.problems.append(problem)
        self.explained.update(problem.parameters)

    def note(self, text: str) -> None:
        """Add a fact that numbers cannot prove, or that is not a mistake."""
        self.notes.append(text)
