"""Read the history of a run from the file that W&B writes on the training machine, without W&B.

The file is a LevelDB log: blocks of 32 KiB with chunks. Each chunk has a checksum, a length and its position in a
record. A record is a protocol buffer message. The field numbers below are those of W&B's `wandb_internal.proto`, which
cannot change without making older files unreadable.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from ..errors import RunError
from .columns import Line

__all__ = ["SUFFIX", "find_records", "read_history"]

SUFFIX = ".wandb"

MAGIC = b":W&B\xe1\xbe\x00"
"""First bytes of a file of format version 0, which all versions of W&B have written so far."""

BLOCK = 1 << 15
"""Size of a block in bytes."""

CHUNK = struct.Struct("<IHB")
"""Header of a chunk: checksum, length and kind, which is 1 for a whole record, and 2, 3 or 4 for a part of one."""

HISTORY = 2
"""Field number of the history in a record."""

ITEM, STEP = 1, 2
"""Field numbers of an item and of the step in a history."""

KEY, NESTED_KEY, VALUE = 1, 2, 16
"""Field numbers of the name, of a part of a nested name, and of the JSON text in an item."""

Field: TypeAlias = tuple[int, int | bytes]
"""Number and value of a field: the bytes of a message or text, or an integer."""


def find_records(directory: Path) -> list[Path]:
    """Return the W&B files in the directory of a run, of several runs or of a job, sorted by their times."""
    return sorted(
        path for pattern in ("", "*run-*/", "wandb/*run-*/") for path in directory.glob(f"{pattern}*{SUFFIX}")
    )


def read_history(path: Path) -> list[Line]:
    """Read the rows that a run logged. The end of a file that is being written is ignored.

    Raises:
        RunError: the file has another format.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise RunError(
            f"{path} is not a file of W&B that distclip can read. Use `wandb sync {path.parent}`, and then "
            '`wandb.Api().run("ENTITY/PROJECT/RUN").history(samples=10**9).to_csv("run.csv")`'
        )
    try:
        return [
            _parse_row(value)
            for record in _records(content)
            for number, value in _fields(record)
            if number == HISTORY and isinstance(value, bytes)
        ]
    except (IndexError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records up to the first chunk that is torn."""
    position, record = len(MAGIC), b""
    while position + CHUNK.size <= len(content):
        if (left := BLOCK - position % BLOCK) < CHUNK.size:
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(content, position)
        position += CHUNK.size
        data = content[position : position + length]
        position += length
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        record = data if kind in (1, 2) else record + data
        if kind in (1, 4):
            yield record


def _parse_row(history: bytes) -> Line:
    row: Line = {}
    for number, value in _fields(history):
        if not isinstance(value, bytes):
            continue
        if number == ITEM:
            fields = [(key, text.decode()) for key, text in _fields(value) if isinstance(text, bytes)]
            name = "/".join(text for key, text in fields if key in (KEY, NESTED_KEY))
            row[name] = next((json.loads(text) for key, text in fields if key == VALUE), None)
        elif number == STEP:
            row.setdefault("_step", next((step for _, step in _fields(value)), 0))
    return row


def _fields(message: bytes) -> Iterator[Field]:
    """Yield the fields of a protocol buffer message.

    Raises:
        IndexError, ValueError: the bytes are no message.
    """
    position = 0

    def read_integer() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        number, kind = divmod(read_integer(), 8)
        if kind == 0:
            yield number, read_integer()
            continue
        length = {1: 8, 5: 4}[kind] if kind in (1, 5) else read_integer() if kind == 2 else -1
        if length < 0 or position + length > len(message):
            raise ValueError("a record is damaged")
        yield number, message[position : position + length]
        position += length
