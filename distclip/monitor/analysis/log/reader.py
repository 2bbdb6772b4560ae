"""Read a file of JSON lines block by block, and parse its steps, sessions, spikes and culprits."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ....errors import printable
from ...columnar.vectors import decode
from ...jsonl import COLUMNS
from ..errors import RunError
from ..spikes import Culprit, Difference, Spike, parse_culprits, parse_differences, parse_spike
from ..statistics import Numbers
from .columns import Columns, Line, TensorNorms

__all__ = ["LineReader", "LogParser", "Session"]

BLOCK_SIZE = 1 << 20
"""Number of bytes to read at once. The parsed objects take about twenty times as much memory."""

MAX_LINE_SIZE = 1 << 27
"""Maximum number of bytes of a line. The norms of a million tensors take 20 MB."""

MAX_DETAILS = 10_000
"""Maximum number of spikes, and of culprits, that are kept."""

DETAILS = {"norms", "tensor_norms", "spike", "ids", "worst", "culprits", "replicas"}
"""Keys of a line that are parsed step by step."""


Rows: TypeAlias = tuple[NDArray[np.int64], Mapping[str, Numbers], Mapping[str, NDArray[np.bool_]]]
"""Steps, and their numbers and flags by key."""


class LineReader:
    """Iterates once over a file, in blocks of JSON objects. Unreadable lines are skipped and counted.

    Args:
        path: path of the file.

    Raises:
        RunError: during iteration, if the file cannot be read or does not consist of lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0
        """Number of lines read so far."""
        self.unreadable: list[int] = []
        """1-based numbers of the lines that are not a JSON object."""

    def __iter__(self) -> Iterator[list[Line]]:
        try:
            with self.path.open("rb") as file:
                for block in self._blocks(file):
                    yield self.parse(block)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield blocks that end at the end of a line."""
        remainder = b""
        while block := file.read(BLOCK_SIZE):
            head, newline, tail = block.rpartition(b"\n")
            if newline:
                yield remainder + head
                remainder = tail
            else:
                remainder += tail
            if len(remainder) > MAX_LINE_SIZE:
                raise RunError(
                    f"{self.path} is not a file of JSON lines: it has {MAX_LINE_SIZE >> 20} MiB without a line break"
                )
        if remainder:
            yield remainder

    def parse(self, block: bytes) -> list[Line]:
        """Parse a block that ends at the end of a line."""
        lines = block.decode(errors="replace").split("\n")
        first, self.num_lines = self.num_lines, self.num_lines + len(lines)
        # After a power loss, a file may contain zero bytes where a line was being written.
        lines = [line.strip(" \t\r\x00") for line in lines]
        texts = [line for line in lines if line]
        # Parsing a block at once is many times as fast as parsing line by line. A JSON string cannot contain a line
        # break, so truncated lines cannot combine into valid ones.
        if all(line[0] == "{" and line[-1] == "}" for line in texts):
            try:
                objects: list[Line] = json.loads("[" + ",\n".join(texts) + "]")
            except (ValueError, RecursionError):
                pass
            else:
                if len(objects) == len(texts):
                    return objects
        return list(self._parse_one_by_one(lines, first))

    def _parse_one_by_one(self, lines: list[str], first: int) -> Iterator[Line]:
        for number, line in enumerate(lines, first + 1):
            if not line:
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield value
            else:
                self.unreadable.append(number)


@dataclass(frozen=True, slots=True)
class Session:
    """The part of a run that one recorder wrote.

    Args:
        start: first step of the session.
        header: facts that the recorder wrote about the run.
    """

    start: int
    header: Mapping[str, Any]


class LogParser:
    """Parses recorder lines into columns. A repeated step replaces the earlier one (resumed run).

    Args:
        tensors: norms of tensors to add to; None for new ones.
        has_parts: whether the lines follow the parts of a columnar log. A header that continues a session then starts
            none.
    """

    def __init__(self, tensors: TensorNorms | None = None, has_parts: bool = False) -> None:
        self.columns = Columns()
        self.tensors = TensorNorms() if tensors is None else tensors
        self._has_parts, self._lacks_parts = has_parts, False
        self.spikes: list[Spike] = []
        self.culprits: list[Culprit] = []
        self.differences: list[Difference] = []
        self.sessions: list[Session] = []
        self.invalid = 0
        """Number of lines that have a norm and a step that is not an integer."""
        self.other_keys: dict[str, None] = {}
        """First few keys of lines that are neither a header nor a step."""
        self._header: Line | None = None
        self._names: tuple[str, ...] = ()
        self._key = ""

    def add(self, lines: Sequence[Line]) -> None:
        """Parse the next lines."""
        steps: list[int] = []
        rows: list[Line] = []
        last = self.columns.steps[-1] if self.columns.steps else -math.inf
        for line in lines:
            if "norm" in line and "step" in line and "distclip" not in line:
                step = _parse_integer(line["step"])
                if step is None:
                    self.invalid += 1
                    continue
                # The first step after a header and a step that repeats an earlier number both start a new part.
                if step <= last or self._header is not None:
                    self._append(steps, rows)
                    steps, rows = [], []
                    self._restart_at(step)
                steps.append(step)
                rows.append(line)
                last = step
            elif "distclip" in line:
                self._append(steps, rows)
                steps, rows = [], []
                self._header = line
                columns = line.get("columns")
                part = columns.get("part") if isinstance(columns, dict) else None
                self._lacks_parts |= not self._has_parts and part not in (None, 1)
            elif len(self.other_keys) < 8:
                self.other_keys.update(dict.fromkeys(line))
        self._append(steps, rows)

    def check(self, reader: LineReader) -> None:
        """Raise if the file had no step.

        Raises:
            RunError: no line has both a step and a norm, or the lines follow the parts of a columnar log.
        """
        if self._lacks_parts:
            raise RunError(f"{reader.path} has only the last steps of a columnar log. Restore {COLUMNS} next to it")
        if self.columns.steps:
            return
        path, example = reader.path, 'Expected the lines of a distclip.monitor.Recorder: {"step": 1, "norm": 0.7, …}'
        if not reader.num_lines:
            raise RunError(f"{path} is empty: no step was recorded")
        if self.invalid:
            raise RunError(f'{path} has norms, but no "step" in it is an integer. {example}')
        if self.other_keys:
            keys = ", ".join(map(printable, list(self.other_keys)[:8]))
            raise RunError(f'{path} has no line with a "step" and a "norm", only {keys}. {example}')
        if self._header is not None:
            every = self._header.get("every")
            period = f" (the recorder writes every {every} steps)" if isinstance(every, int) else ""
            raise RunError(f"{path} has a header and no steps: the run ended before the first write{period}")
        raise RunError(f"{path} has no line that is a JSON object. {example}")

    def _restart_at(self, step: int) -> None:
        """Drop this and later steps, and start the session of the last header."""
        self.columns.drop_from(step)
        self.tensors.drop_from(step)
        for details in (self.spikes, self.culprits, self.differences):
            del details[bisect_left([detail.step for detail in details], step) :]
        if self._header is not None:
            # The header of a columnar log is repeated whenever its file of lines is replaced.
            columns = self._header.pop("columns", None)
            columns = columns if isinstance(columns, dict) else {}
            continues = columns.get("continues") is True
            if not (continues and self._has_parts):
                self._start_session(Session(step, self._header))
            tensors, slots = (_parse_names(self._header.get(key)) for key in ("tensors", "slots"))
            self._key, self._names = ("tensor_norms", tensors) if tensors else ("norms", slots)
            self._header = None

    def extend(self, rows: Rows, details: Mapping[int, Mapping[str, Any]], sessions: Iterable[Session]) -> None:
        """Append the columns of steps that follow all earlier steps.

        Args:
            rows: (steps, numbers, flags), see `Columns.extend`.
            details: fields of spikes, culprits and differences, by step.
            sessions: sessions that began at one of the steps.
        """
        steps, numbers, _ = rows
        self.columns.extend(*rows)
        norms = dict(zip(steps.tolist(), numbers["norm"].tolist(), strict=True)) if details else {}
        self.add_details((step, {"norm": norms[step], **fields}) for step, fields in details.items())
        for session in sessions:
            self._start_session(session)

    def _start_session(self, session: Session) -> None:
        while self.sessions and self.sessions[-1].start >= session.start:
            self.sessions.pop()
        self.sessions.append(session)

    def _append(self, steps: Sequence[int], lines: Sequence[Line]) -> None:
        if not steps:
            return
        self.columns.add(steps, lines)
        if DETAILS.isdisjoint(key for layout in set(map(tuple, lines)) for key in layout):
            return
        for step, line in zip(steps, lines, strict=True):
            if self._key in line:
                norms = line[self._key]
                self.tensors.add(step, self._names, norms if isinstance(norms, list) else decode(norms))
        self.add_details(zip(steps, lines, strict=True))

    def add_details(self, lines: Iterable[tuple[int, Line]]) -> None:
        """Parse the spikes, culprits and differences of (step, line)."""
        for step, line in lines:
            if (spike := parse_spike(step, line)) is not None:
                self.spikes.append(spike)
            if "culprits" in line and len(self.culprits) < MAX_DETAILS:
                self.culprits += parse_culprits(step, line)
            if "replicas" in line and len(self.differences) < MAX_DETAILS:
                self.differences += parse_differences(step, line)
        if len(self.spikes) > 2 * MAX_DETAILS:
            most_extreme = sorted(self.spikes, key=_extremity, reverse=True)[:MAX_DETAILS]
            self.spikes = sorted(most_extreme, key=lambda spike: spike.step)


def _parse_integer(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(1 << 63) <= value < 1 << 63 else None


def _extremity(spike: Spike) -> float:
    if math.isnan(spike.norm):
        return math.inf
    return 0.0 if math.isnan(spike.ratio) else spike.ratio


def _parse_names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
