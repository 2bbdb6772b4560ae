"""Append the lines of a run to a columnar log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..analysis.errors import RunError
from ..analysis.log.reader import LineReader
from ..jsonl import COLUMNS, JsonLines
from .pyramid import BUCKET
from .store import Store
from .tail import header_part, make_part_of_lines
from .vectors import encode

__all__ = ["ROWS", "ColumnarLines"]

ROWS = 4 * BUCKET
"""Number of steps after which lines become a part."""

MAX_SIZE = 1 << 28
"""Maximum size in bytes of an existing log of lines that can be converted."""


class ColumnarLines(JsonLines):
    """Lines of a run that are stored as columns, except for the last ones.

    An existing log of lines becomes a columnar one.

    Args:
        path: path of `metrics.jsonl`. It is created with its directory if it does not exist.

    Raises:
        RunError: an existing columnar log is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._store = Store(path.with_name(COLUMNS))
        self._store.clean()
        if path.stat().st_size > MAX_SIZE:
            raise RunError(
                f"{path} has more than {MAX_SIZE >> 20} MiB of lines, too many to convert. Record to another directory"
            )
        lines = [line for block in LineReader(path) for line in block]
        if 0 < header_part(lines) <= self._store.last_number():
            # A crash happened after the part was renamed and before its lines were replaced.
            _replace(path, b"")
            lines = []
        self._num_steps = sum("distclip" not in line for line in lines)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one line per row, and store the lines as a part if there are enough of them."""
        rows = list(rows)
        super().append(self._add_part_number(row) for row in rows)
        self._num_steps += sum("distclip" not in row for row in rows)
        if self._num_steps >= ROWS:
            self._store_lines()

    def convert_vector(self, values: Any) -> Any:
        """Return a vector as it is in a line."""
        return encode(values)

    def _add_part_number(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, "columns": {"part": self._store.last_number() + 1}} if "distclip" in row else row

    def _store_lines(self) -> None:
        """Store the first lines as a part, and keep those that would not fill a row of the pyramid."""
        texts = self.path.read_bytes().splitlines(keepends=True)
        num_left = self._num_steps % BUCKET
        # Headers and torn lines are rare. They stay with the lines before them.
        num_stored, num_steps = len(texts), 0
        while num_steps < num_left:
            num_stored -= 1
            num_steps += not texts[num_stored].startswith(b'{"distclip"')
        lines = LineReader(self.path).parse(b"".join(texts[:num_stored]).rstrip(b"\n"))
        header = next((line for line in reversed(lines) if "distclip" in line), {})
        part = make_part_of_lines(lines)
        if part is not None:
            self._store.add(part)
        # If the first step after a header is among the remaining lines, the header has not begun a session yet.
        columns = {"part": self._store.last_number() + 1, "continues": lines[-1] is not header}
        first = json.dumps({"distclip": "", **header, "columns": columns}).encode() + b"\n"
        _replace(self.path, b"".join([first, *texts[num_stored:]]))
        self._num_steps = num_left


def _replace(path: Path, content: bytes) -> None:
    """Replace a file by another one that is already on the disk."""
    temporary = path.with_name(f"{path.name}.unfinished")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
