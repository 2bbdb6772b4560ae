"""Columns that grow by blocks of lines, and shrink when a run goes on from an earlier step."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reading import Line
from .spikes import number

__all__ = ["Columns", "numbers_of"]

FLAGS = ("clipped", "finite", "skipped")

KNOWN = {"step", "norm", "bound", "coef", "norms", "tensor_norms", "culprits", "spike", "ids", "worst", *FLAGS}
"""Not columns of the user's."""


class Columns:
    """The numbers of all steps so far, by key, each as long as `steps`; NaN where a line has none."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.numbers: dict[str, array[float]] = {key: array("d") for key in ("norm", "bound", "coef")}
        self.flags: dict[str, array[int]] = {key: array("b") for key in FLAGS}

    def add(self, steps: Sequence[int], lines: Sequence[Line]) -> None:
        """More lines, whose steps increase and come after all so far."""
        layouts = set(map(tuple, lines))
        keys = dict.fromkeys(key for layout in layouts for key in layout)
        everywhere = set.intersection(*map(set, layouts)) if layouts else set()

        def values(key: str) -> list[Any]:
            if key in everywhere:
                return list(map(itemgetter(key), lines))
            return [line.get(key) for line in lines]

        found = {key: numbers_of(values(key)) for key in ("norm", "bound", "coef")}
        # What cannot be a norm or a factor that shortens is none.
        found["norm"][found["norm"] < 0] = np.nan
        found["coef"][~((found["coef"] >= 0) & (found["coef"] <= 1))] = 1.0
        for key in keys:
            if key not in KNOWN:
                told = values(key)
                if key in self.numbers or not {int, float}.isdisjoint(map(type, told)):
                    found[key] = numbers_of(told)
        before, after = len(self.steps), len(self.steps) + len(steps)
        self.steps.extend(steps)
        for key, numbers in found.items():
            column = self.numbers.setdefault(key, array("d"))
            _pad(column, before)
            column.frombytes(numbers.tobytes())
        for column in self.numbers.values():
            _pad(column, after)
        implied = {
            "clipped": found["coef"] < 1,
            "finite": ~np.isnan(found["norm"]),
            "skipped": np.zeros(len(steps), np.bool_),
        }
        for key, otherwise in implied.items():
            self.flags[key].frombytes(_flags(values(key) if key in keys else [], otherwise).tobytes())

    def drop_from(self, step: int) -> None:
        """Forget this step and all after it."""
        length = bisect_left(self.steps, step)
        del self.steps[length:]
        for numbers in self.numbers.values():
            del numbers[length:]
        for flags in self.flags.values():
            del flags[length:]

    def number(self, key: str) -> NDArray[np.float64]:
        """A column, without a copy."""
        return np.frombuffer(self.numbers[key], np.float64)

    def flag(self, key: str) -> NDArray[np.bool_]:
        """A column of yes and no, without a copy."""
        return np.frombuffer(self.flags[key], np.bool_)


def numbers_of(values: list[Any]) -> NDArray[np.float64]:
    """As floats; NaN for what is no finite number."""
    if set(map(type, values)) <= {int, float, type(None)}:
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:  # an integer of 400 digits
            pass
        else:
            numbers[np.isinf(numbers)] = np.nan
            return numbers
    return np.array([number(value) for value in values], np.float64)


def _flags(told: list[Any], otherwise: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if not told:
        return otherwise
    if set(map(type, told)) == {bool}:
        return np.array(told, np.bool_)
    pairs = zip(told, otherwise.tolist(), strict=True)
    return np.array([bool(each) if each in (0, 1) else other for each, other in pairs], np.bool_)


def _pad(column: array[float], length: int) -> None:
    if (missing := length - len(column)) > 0:
        column.frombytes(np.full(missing, np.nan).tobytes())
