"""Read the parts of a columnar log, and the lines after them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...columnar.files import WINDOW, read_level, read_part, read_rows, read_window
from ...columnar.part import Part, join_tables, trim
from ...columnar.pyramid import BUCKET, FACTOR, Level, coarsen, summarize
from ...columnar.store import Store, StoredPart
from ...columnar.tail import header_part, make_part_of_lines
from ..errors import RunError
from .columns import MAX_CELLS, MAX_ROWS, TensorTable
from .reader import LineReader, LogParser, Session

__all__ = ["read_parts"]

MAX_LEVEL_ROWS = 1000
"""Maximum number of rows of the pyramid that are read. A heat map has fewer columns."""

MAX_ATTEMPTS = 20
"""Maximum number of attempts to read the log of a running job, which may merge parts between two reads."""

SINGLE_STEPS = -1
"""Level at which each step has a separate row."""


def read_parts(file: Path, directory: Path) -> tuple[LineReader, LogParser, TensorTable]:
    """Read a columnar log.

    Args:
        file: file of lines, which may not exist.
        directory: directory of the parts.

    Raises:
        RunError: a file is missing or damaged.
    """
    for _ in range(MAX_ATTEMPTS):
        # The lines are read first. If they become a part in the meantime, they are ignored in favor of the part.
        reader = LineReader(file)
        lines = [line for block in reader for line in block] if file.is_file() else []
        stored = Store(directory).parts()
        try:
            parser, table = _read(file, stored, _make_tail(file, header_part(lines), stored, lines))
        except FileNotFoundError as error:
            missing = error.filename
        else:
            if not stored:
                parser.check(reader)
            return reader, parser, table
    raise RunError(f"{missing} is missing")


def _make_tail(file: Path, number: int, stored: Sequence[StoredPart], lines: list[dict[str, object]]) -> Part | None:
    """Return the steps after all parts, if there are any."""
    last = stored[-1].last if stored else 0
    if number > last + 1:
        raise RunError(f"{file} follows part {number - 1}, but the last part is {last}. Restore the missing parts")
    return None if 0 < number <= last else make_part_of_lines(lines)


def _read(file: Path, stored: Sequence[StoredPart], tail: Part | None) -> tuple[LogParser, TensorTable]:
    parser = LogParser()
    stop = None if tail is None or not len(tail.steps) else int(tail.steps[0])
    whole = [part for part in stored if stop is None or part.info.last < stop]
    divided = [part for part in stored if stop is not None and part.info.first < stop <= part.info.last]
    number = _choose_level([*whole, *divided], tail)
    levels: list[tuple[tuple[str, ...], Level]] = []
    for part in whole:
        info = part.info
        steps, numbers, flags, details = read_rows(part.path, info)
        parser.extend((steps, numbers, flags), details, [Session(*session) for session in info.sessions])
        if info.tensors:
            levels.append((info.tensors, _read_level(part, number)))
    trimmed = [trim(read_part(part.path), stop) for part in divided if stop is not None]
    for rows in [*trimmed, *([] if tail is None else [tail])]:
        sessions = [Session(*session) for session in rows.sessions]
        parser.extend((rows.steps, rows.numbers, rows.flags), rows.details, sessions)
        if rows.tensors:
            levels.append((rows.tensors, _level_of(rows, number)))
    if not parser.columns.steps and stored:
        raise RunError(f"{file.parent} has no step")
    names, tables = join_tables([(names, [level.end, level.high]) for names, level in levels])
    steps = np.concatenate([np.zeros(0, np.int64), *(level.first for _, level in levels)])
    norms, peaks = (table.astype(np.float64) for table in tables)
    return parser, (names, steps, norms, peaks)


def _choose_level(stored: Sequence[StoredPart], tail: Part | None) -> int:
    """Return the finest level that does not have too many rows."""
    rows = [(part.info.num_rows, part.info.tensors) for part in stored if part.info.tensors]
    rows += [(len(tail.window_steps), tail.tensors)] if tail is not None else []
    max_rows = MAX_CELLS // max((len(tensors) for _, tensors in rows if tensors), default=1)
    windows = all((part.path / WINDOW).exists() for part in stored if part.info.tensors)
    if windows and sum(count for count, _ in rows) <= min(MAX_ROWS, max_rows):
        return SINGLE_STEPS
    number = 0
    # Beyond level 8, which summarizes 4 billion steps, each part has one row.
    while number < 8 and sum(-(-count // _size(number)) for count, _ in rows) > min(MAX_LEVEL_ROWS, max_rows):
        number += 1
    return number


def _size(number: int) -> int:
    return BUCKET * int(FACTOR**number)


def _read_level(part: StoredPart, number: int) -> Level:
    if number == SINGLE_STEPS:
        return summarize(*read_window(part.path, part.info), bucket=1)
    return read_level(part.path, part.info, number, with_low=False)


def _level_of(part: Part, number: int) -> Level:
    if number == SINGLE_STEPS:
        return summarize(part.window_steps, part.window, bucket=1)
    level = part.level
    for _ in range(number):
        level = coarsen(level)
    return level
