"""Convert the lines of `metrics.jsonl` to a part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from ..analysis.log.columns import Line, TensorNorms
from ..analysis.log.reader import LogParser
from ..analysis.spikes import parse_number
from .part import FLAGS, Part, join_tables, make_part
from .pyramid import Norms, Steps
from .vectors import to_float32

__all__ = ["header_part", "make_part_of_lines"]

DETAILS = ("spike", "ids", "worst", "culprits", "replicas")
"""Fields of a line that are neither numbers nor vectors."""


class _AllRows(TensorNorms):
    """Rows of all steps, as float32."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[int, tuple[str, ...], Norms]] = []

    def add(self, step: int, names: tuple[str, ...], norms: Sequence[Any] | Norms | None) -> None:
        if norms is not None and len(names) == len(norms) > 0:
            numbers = [parse_number(norm) for norm in norms] if isinstance(norms, list) else norms
            self.all.append((step, names, to_float32(numbers)))

    def drop_from(self, step: int) -> None:
        while self.all and self.all[-1][0] >= step:
            self.all.pop()

    def window(self) -> tuple[tuple[str, ...], Steps, Norms]:
        """Return the names of all tensors, the steps, and their norms."""
        groups = []
        for names, rows in groupby(self.all, key=itemgetter(1)):
            table = np.stack([norms for _, _, norms in rows])
            groups.append((names, [table, table]))
        all_names, (table, _) = join_tables(groups)
        return all_names, np.array([step for step, _, _ in self.all], np.int64), table


class _TailParser(LogParser):
    """Parses all norms of tensors, and keeps the details unchanged."""

    def __init__(self) -> None:
        self.rows = _AllRows()
        super().__init__(self.rows, has_parts=True)
        self.details: dict[int, dict[str, Any]] = {}

    def add_details(self, lines: Iterable[tuple[int, Line]]) -> None:
        for step, line in lines:
            if fields := {key: line[key] for key in DETAILS if key in line}:
                self.details[step] = fields

    def _restart_at(self, step: int) -> None:
        super()._restart_at(step)
        self.details = {number: fields for number, fields in self.details.items() if number < step}


def make_part_of_lines(lines: Sequence[Line]) -> Part | None:
    """Convert lines to a part, or return None if they have no step."""
    parser = _TailParser()
    parser.add(lines)
    columns = parser.columns
    if not columns.steps:
        return None
    tensors, window_steps, window = parser.rows.window()
    return make_part(
        steps=np.frombuffer(columns.steps, np.int64),
        numbers={key: columns.number(key) for key in columns.numbers},
        flags={key: columns.flag(key) for key in FLAGS},
        details=parser.details,
        sessions=[(session.start, session.header) for session in parser.sessions],
        tensors=tensors,
        window_steps=window_steps,
        window=window,
    )


def header_part(lines: Iterable[Line]) -> int:
    """Return the number of the part that lines will become, or 0 if they belong to no columnar log."""
    number = 0
    for line in lines:
        columns = line.get("columns") if "distclip" in line else None
        if isinstance(columns, dict) and type(columns.get("part")) is int:
            number = max(number, columns["part"])
    return number
