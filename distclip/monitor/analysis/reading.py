"""The lines of a file as dictionaries, a block at a time; what cannot be read is left out and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from .errors import RunError

__all__ = ["Line", "Reader"]

Line: TypeAlias = dict[str, Any]

BLOCK = 1 << 20
"""Bytes read at once: of their objects, some twenty times as many are held."""

LONGEST = 1 << 27
"""Bytes of a line: a million tensors' norms are 20 MB."""


class Reader:
    """One pass over a file.

    Args:
        path: of the file.

    Raises:
        RunError: while it is read: it cannot be opened, or is not made of lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read = 0
        self.torn: list[int] = []
        """Numbers of the lines that are no JSON object, from 1."""

    def __iter__(self) -> Iterator[list[Line]]:
        try:
            with self.path.open("rb") as file:
                for block in self._blocks(file):
                    yield self._parsed(block)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        """Whole lines."""
        rest = b""
        while block := file.read(BLOCK):
            whole, newline, tail = block.rpartition(b"\n")
            if newline:
                yield rest + whole
                rest = tail
            else:
                rest += tail
            if len(rest) > LONGEST:
                raise RunError(f"{self.path} is not a file of JSON lines: {LONGEST >> 20} MiB without a line's end")
        if rest:
            yield rest

    def _parsed(self, block: bytes) -> list[Line]:
        lines = block.decode(errors="replace").split("\n")
        first, self.read = self.read, self.read + len(lines)
        # A disk that lost power may leave zeros where a line was going to be.
        lines = [line.strip(" \t\r\x00") for line in lines]
        together = [line for line in lines if line]
        # Many times as fast as one by one. No string of JSON spans lines, so that torn ones cannot make up whole ones.
        if all(line[0] == "{" and line[-1] == "}" for line in together):
            try:
                found: list[Line] = json.loads("[" + ",\n".join(together) + "]")
            except (ValueError, RecursionError):
                pass
            else:
                if len(found) == len(together):
                    return found
        return list(self._one_by_one(lines, first))

    def _one_by_one(self, lines: list[str], first: int) -> Iterator[Line]:
        for number, line in enumerate(lines, first + 1):
            if not line:
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                yield found
            else:
                self.torn.append(number)
