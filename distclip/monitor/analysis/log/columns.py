"""Store steps as columns that grow block by block, and that shrink when a run resumes from an earlier step."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..spikes import parse_number
from ..statistics import Numbers

__all__ = ["Columns", "Line", "TensorNorms", "TensorTable"]

Line: TypeAlias = dict[str, Any]
"""One JSON object of a file."""

TensorTable: TypeAlias = tuple[tuple[str, ...], NDArray[np.int64], Numbers, Numbers]
"""Names of tensors, first step of each row, norms at one step of each row, and the largest norms of all its steps."""

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
"""Keys of a line that are not the user's own numbers."""

MAX_ROWS = 2000
"""Maximum number of rows of tensor norms. No screen has more pixels."""

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
            # itemgetter is faster, but works only if all lines have the key.
            return list(map(itemgetter(key), lines)) if key in common else [line.get(key) for line in lines]

        new = {key: _as_numbers(values(key)) for key in ("norm", "bound", "coef")}
        # No recorder writes a negative norm, or a negative or infinite coefficient, so they count as missing.
        new["norm"][new["norm"] < 0] = np.nan
        new["coef"][~((new["coef"] >= 0) & (new["coef"] < np.inf))] = 1.0
        for key in keys:
            if key not in KNOWN:
                column = values(key)
                if key in self.numbers or not {int, float}.isdisjoint(map(type, column)):
                    new[key] = _as_numbers(column)
        # Lines that were written by hand may lack the flags, which are then derived from the numbers.
        derived = {
            "clipped": new["coef"] != 1,
            "finite": ~np.isnan(new["norm"]),
            "skipped": np.zeros(len(steps), np.bool_),
        }
        flags = {key: _as_flags(values(key) if key in keys else [], default) for key, default in derived.items()}
        self.extend(np.array(steps, np.int64), new, flags)

    def extend(
        self, steps: NDArray[np.int64], numbers: Mapping[str, Numbers], flags: Mapping[str, NDArray[np.bool_]]
    ) -> None:
        """Append columns of steps that follow all earlier steps."""
        before, after = len(self.steps), len(self.steps) + len(steps)
        self.steps.frombytes(steps.tobytes())
        for key, column in numbers.items():
            stored = self.numbers.setdefault(key, array("d"))
            _pad(stored, before)
            stored.frombytes(column.tobytes())
        for stored in self.numbers.values():
            _pad(stored, after)
        for key in FLAGS:
            self.flags[key].frombytes(flags[key].tobytes())

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
    """Rows of per-tensor norms. When there are too many rows, every other row is dropped.

    Each row also has the largest norms of the steps from its step to the next row, so that no peak is dropped.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.num_added = 0
        self.steps: list[int] = []
        self.rows: list[TensorRow] = []

    def add(self, step: int, names: tuple[str, ...], norms: Sequence[Any] | NDArray[np.float32] | None) -> None:
        """Store the norms of a step, in a new row if the stride selects it.

        Args:
            step: number of the step, larger than all earlier ones.
            names: names of the tensors.
            norms: one norm per name. None and a list of another length are ignored.
        """
        if norms is not None and len(names) == len(norms) > 0:
            numbers = _as_numbers(norms) if isinstance(norms, list) else np.asarray(norms, np.float64)
            if self.num_added % self.stride == 0 or not self.rows:
                self.steps.append(step)
                self.rows.append(TensorRow(names, numbers, numbers))
                if len(self.rows) > max(16, min(MAX_ROWS, MAX_CELLS // len(names))):
                    self._halve()
            else:
                self.rows[-1] = self.rows[-1].raised_by(names, numbers)
        self.num_added += 1

    def _halve(self) -> None:
        pairs = zip(self.rows[::2], [*self.rows[1::2], None], strict=False)
        self.rows = [row if after is None else row.raised_by(after.names, after.peaks) for row, after in pairs]
        del self.steps[1::2]
        self.stride *= 2

    def drop_from(self, step: int) -> None:
        """Remove this step and all later ones."""
        length = bisect_left(self.steps, step)
        del self.steps[length:], self.rows[length:]

    def table(self) -> TensorTable:
        """Return the rows as tables, with NaN for tensors that a step did not have."""
        layouts = list(dict.fromkeys(row.names for row in self.rows))
        all_names = tuple(dict.fromkeys(name for names in layouts for name in names))
        norms, peaks = (np.full((len(self.rows), len(all_names)), np.nan) for _ in range(2))
        column = {name: i for i, name in enumerate(all_names)}
        columns_of = {names: [column[name] for name in names] for names in layouts}
        for i, row in enumerate(self.rows):
            norms[i, columns_of[row.names]], peaks[i, columns_of[row.names]] = row.norms, row.peaks
        return all_names, np.array(self.steps, np.int64), norms, peaks


@dataclass(frozen=True)
class TensorRow:
    """Norms of the tensors at a step, and the largest norms up to the next row."""

    names: tuple[str, ...]
    norms: Numbers
    peaks: Numbers

    def raised_by(self, names: tuple[str, ...], norms: Numbers) -> TensorRow:
        """Return the row with the norms of a later step in its peaks. A step with other tensors is ignored."""
        return replace(self, peaks=np.fmax(self.peaks, norms)) if names == self.names else self


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
