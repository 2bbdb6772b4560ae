"""List the cases of the benchmark: local cases in one process, and sharded cases on a world of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..race import Options
from ..results import Outcome
from .local import LOCAL
from .sharded import SHARDED

__all__ = ["CASES", "Case"]


class Case(Protocol):
    """Gradients of one kind for competitors to clip."""

    @property
    def name(self) -> str:
        """Name for `--cases`."""
        ...

    @property
    def title(self) -> str:
        """Description in one line."""
        ...

    @property
    def devices(self) -> Sequence[str]:
        """Types of devices that the case runs on."""
        ...

    @property
    def divisor(self) -> int:
        """Number that the world size must be a multiple of."""
        ...

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Build the gradients, count costs and time the competitors. Call `advance` after each round."""
        ...


CASES: dict[str, Case] = {**LOCAL, **SHARDED}
"""All cases by name, in the order of `--list`."""
