"""The norms of single tensors at some of the steps."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import numbers_of

__all__ = ["TensorNorms"]

MOST = 2000
"""Rows: more than a screen has pixels for."""

CELLS = 16_000_000
"""Numbers in all rows, 128 MB; of very many tensors there are fewer rows."""


class TensorNorms:
    """Rows of norms, at most so many: when there are more, every other one goes."""

    def __init__(self) -> None:
        self.stride = 1
        self.seen = 0
        self.steps: list[int] = []
        self.rows: list[tuple[tuple[str, ...], NDArray[np.float64]]] = []

    def add(self, step: int, names: tuple[str, ...], norms: list[Any]) -> None:
        """The norms of one more step, if it is the turn of one.

        Args:
            step: after all so far.
            names: of the tensors.
            norms: one for each name; else they are of no use.
        """
        if self.seen % self.stride == 0 and len(names) == len(norms) > 0:
            self.steps.append(step)
            self.rows.append((names, numbers_of(norms)))
            if len(self.rows) > max(16, min(MOST, CELLS // len(names))):
                del self.steps[1::2], self.rows[1::2]
                self.stride *= 2
        self.seen += 1

    def drop_from(self, step: int) -> None:
        """Forget this step and all after it."""
        length = bisect_left(self.steps, step)
        del self.steps[length:], self.rows[length:]

    def table(self) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """All names, and a row for each of `steps`; NaN for a tensor that was not there then."""
        names = tuple(dict.fromkeys(name for each in dict.fromkeys(each for each, _ in self.rows) for name in each))
        table = np.full((len(self.rows), len(names)), np.nan)
        place = {name: i for i, name in enumerate(names)}
        where = {each: [place[name] for name in each] for each in dict.fromkeys(each for each, _ in self.rows)}
        for row, (each, norms) in zip(table, self.rows, strict=True):
            row[where[each]] = norms
        return names, table
