"""Store steps as columns that grow block by block, and that shrink when a run resumes from an earlier step."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..spikes import parse_number
from ..statistics import Numbers

__all__ = ["Columns", "Line", "TensorNorms"]

Line: TypeAlias = dict[str, Any]
"""One JSON object of a file."""

FLAGS = ("clipped", "finite", "skipped")
"""Names of the columns of bools."""

KNOWN = {
    "step",
    "norm",
    "bound",
    "coef",
    "norms",
    "tensor_norms",
    "culprits",
    "replicas",
    "spike",
    "ids",
    "worst",
    *FLAGS,
}
"""Keys of a line that do not become columns of the user."""

MAX_ROWS = 2000
"""Maximum number of rows of tensor norms. A screen does not have more pixels."""

MAX_CELLS = 16_000_000
"""Maximum number of tensor norms (128 MB). A model with very many tensors keeps fewer rows."""


class Columns:
    """The numbers of all steps so far by key.

    All columns are as long as `steps`, with NaN where a line lacks the key.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.numbers: dict[str, array[float]] = {key: array("d") for key in ("norm", "bound", "coef")}
        self.flags: dict[str, array[int]] = {key: array("b") for key in FLAGS}

    def add(self, steps: Sequence[int], lines: Sequence[Line]) -> None:
        """Append lines whose steps increase and follow all earlier steps."""
        layouts = set(map(tuple, lines))
        keys = dict.fromkeys(key for layout in layouts for key in layout)
        common = set.intersection(*map(set, layouts)) if layouts else set()

        def values(key: str) -> list[Any]:
            # itemgetter is faster, and works where all lines have the key.
            return list(map(itemgetter(key), lines)) if key in common else [line.get(key) for line in lines]

        new = {key: _as_numbers(values(key)) for key in ("norm", "bound", "coef")}
        # A negative norm and a coefficient that is negative or infinite are not from a recorder: treat them as missing.
        new["norm"][new["norm"] < 0] = np.nan
        new["coef"][~((new["coef"] >= 0) & (new["coef"] < np.inf))] = 1.0
        for key in keys:
            if key not in KNOWN:
                column = values(key)
                if key in self.numbers or not {int, float}.isdisjoint(map(type, column)):
                    new[key] = _as_numbers(column)
        before, after = len(self.steps), len(self.steps) + len(steps)
        self.steps.extend(steps)
        for key, numbers in new.items():
            stored = self.numbers.setdefault(key, array("d"))
            _pad(stored, before)
            stored.frombytes(numbers.tobytes())
        for stored in self.numbers.values():
            _pad(stored, after)
        # Lines that were written by hand may lack the flags: derive them from the numbers.
        derived = {
            "clipped": new["coef"] != 1,
            "finite": ~np.isnan(new["norm"]),
            "skipped": np.zeros(len(steps), np.bool_),
        }
        for key, default in derived.items():
            self.flags[key].frombytes(_as_flags(values(key) if key in keys else [], default).tobytes())

    def drop_from(self, step: int) -> None:
        """Remove this step and all later ones."""
        length = bisect_left(self.steps, step)
        del self.steps[length:]
        for numbers in self.numbers.values():
            del numbers[length:]
        for flags in self.flags.values():
            del flags[length:]

    def number(self, key: str) -> Numbers:
        """Return a column of numbers without copying it."""
        return np.frombuffer(self.numbers[key], np.float64)

    def flag(self, key: str) -> NDArray[np.bool_]:
        """Return a column of bools without copying it."""
        return np.frombuffer(self.flags[key], np.bool_)


class TensorNorms:
    """Rows of per-tensor norms. When there are too many rows, every other row is dropped."""

    def __init__(self) -> None:
        self.stride = 1
        self.num_added = 0
        self.steps: list[int] = []
        self.rows: list[tuple[tuple[str, ...], Numbers]] = []

    def add(self, step: int, names: tuple[str, ...], norms: list[Any]) -> None:
        """Store the norms of a step if the stride selects it.

        Args:
            step: number of the step, larger than all earlier ones.
            names: of the tensors.
            norms: one per name. A list of another length is ignored.
        """
        if self.num_added % self.stride == 0 and len(names) == len(norms) > 0:
            self.steps.append(step)
            self.rows.append((names, _as_numbers(norms)))
            if len(self.rows) > max(16, min(MAX_ROWS, MAX_CELLS // len(names))):
                del self.steps[1::2], self.rows[1::2]
                self.stride *= 2
        self.num_added += 1

    def drop_from(self, step: int) -> None:
        """Remove this step and all later ones."""
        length = bisect_left(self.steps, step)
        del self.steps[length:], self.rows[length:]

    def table(self) -> tuple[tuple[str, ...], Numbers]:
        """Return all names, and a row per step with NaN for tensors that the step did not have."""
        layouts = list(dict.fromkeys(names for names, _ in self.rows))
        all_names = tuple(dict.fromkeys(name for names in layouts for name in names))
        table = np.full((len(self.rows), len(all_names)), np.nan)
        column = {name: i for i, name in enumerate(all_names)}
        columns_of = {names: [column[name] for name in names] for names in layouts}
        for row, (names, norms) in zip(table, self.rows, strict=True):
            row[columns_of[names]] = norms
        return all_names, table


def _as_numbers(values: list[Any]) -> Numbers:
    """Convert to floats, with NaN for anything that is not a finite number."""
    if set(map(type, values)) <= {int, float, type(None)}:
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:  # an integer of 400 digits
            pass
        else:
            numbers[np.isinf(numbers)] = np.nan
            return numbers
    return np.array([parse_number(value) for value in values], np.float64)


def _as_flags(values: list[Any], default: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Convert to bools, with `default` where a line has something else or nothing."""
    if not values:
        return default
    if set(map(type, values)) == {bool}:
        return np.array(values, np.bool_)
    pairs = zip(values, default.tolist(), strict=True)
    return np.array([bool(value) if value in (0, 1) else other for value, other in pairs], np.bool_)


def _pad(column: array[float], length: int) -> None:
    if (missing := length - len(column)) > 0:
        column.frombytes(np.full(missing, np.nan).tobytes())
