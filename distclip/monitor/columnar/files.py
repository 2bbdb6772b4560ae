"""Write the files of a part into a directory, and read them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..analysis.errors import RunError
from .part import FLAGS, Part
from .pyramid import Cells, Level, Norms, Steps, coarsen

__all__ = [
    "WINDOW",
    "PartInfo",
    "read_cells",
    "read_info",
    "read_level",
    "read_part",
    "read_rows",
    "read_window",
    "write_part",
]

FORMAT = 1
"""Version of the files. It increases if a reader of old files would misread new ones."""

INFO, STEPS, WINDOW, EXACT = "part.json", "steps.parquet", "window.parquet", "exact.parquet"
"""Names of the files of a part. Its levels are `level-0.parquet`, `level-1.parquet` and so on."""


@dataclass(frozen=True)
class PartInfo:
    """Content of `part.json`.

    Args:
        generation: number of merges.
        num_rows: number of steps.
        first: first step.
        last: last step.
        tensors: names of the columns of norms.
        sessions: (first step, header) of each recorder that began in the part.
        num_levels: number of levels of the pyramid.
    """

    generation: int
    num_rows: int
    first: int
    last: int
    tensors: tuple[str, ...]
    sessions: tuple[tuple[int, Mapping[str, Any]], ...]
    num_levels: int


def write_part(directory: Path, part: Part) -> None:
    """Write all files of a part, and wait until they are on the disk.

    Args:
        directory: an existing, empty directory.
        part: a part with at least one step.
    """
    details = [json.dumps(part.details[step]) if step in part.details else None for step in part.steps.tolist()]
    columns = {"step": part.steps, **part.flags, **part.numbers, "details": pa.array(details, pa.string())}
    _write(directory / STEPS, columns, {"step": "DELTA_BINARY_PACKED"} | _find_raw(part.numbers))
    levels = [part.level] if part.tensors else []
    while levels and len(levels[-1]) > 1:
        levels.append(coarsen(levels[-1]))
    if part.tensors:
        cells = {"step": part.exact.steps, "tensor": part.exact.tensors, "norm": part.exact.norms}
        encodings = {"step": "DELTA_BINARY_PACKED", "tensor": "DELTA_BINARY_PACKED", "norm": "BYTE_STREAM_SPLIT"}
        _write(directory / EXACT, cells, encodings)
        for number, level in enumerate(levels):
            norms = {"min": level.low, "max": level.high, "last": level.end}
            _write_norms(directory / _level_name(number), {"first": level.first, "last_step": level.last}, norms)
        if len(part.window_steps):
            _write_norms(directory / WINDOW, {"step": part.window_steps}, {"norms": part.window})
    info = {
        "format": FORMAT,
        "generation": part.generation,
        "rows": len(part.steps),
        "first_step": int(part.steps[0]),
        "last_step": int(part.steps[-1]),
        "sessions": [{"start": start, "header": header} for start, header in part.sessions],
        "levels": len(levels),
        "tensors": part.tensors,
    }
    (directory / INFO).write_text(json.dumps(info), encoding="utf-8")
    _sync(directory / INFO)
    _sync(directory)


def read_info(directory: Path) -> PartInfo:
    """Read the description of a part.

    Raises:
        RunError: `part.json` is not that of a part. FileNotFoundError: it does not exist.
    """
    path = directory / INFO
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise RunError(
                f"{path} has format {content['format']}, but this version of distclip reads {FORMAT}. Update it"
            )
        sessions = tuple((int(session["start"]), dict(session["header"])) for session in content["sessions"])
        generation, num_rows, first, last = (
            int(content[key]) for key in ("generation", "rows", "first_step", "last_step")
        )
        tensors = tuple(map(str, content["tensors"]))
        return PartInfo(generation, num_rows, first, last, tensors, sessions, int(content["levels"]))


def read_part(directory: Path) -> Part:
    """Read a whole part.

    Raises:
        RunError: a file is damaged. FileNotFoundError: it does not exist.
    """
    info = read_info(directory)
    steps, numbers, flags, details = read_rows(directory, info)
    none = np.zeros((0, len(info.tensors)), np.float32)
    level, exact = Level(steps[:0], steps[:0], none, none, none), _make_cells([], [], [])
    window_steps, window = steps[:0], none
    if info.num_levels:
        level, exact = read_level(directory, info, 0), read_cells(directory)
        window_steps, window = read_window(directory, info)
    return Part(
        steps, numbers, flags, details, info.sessions, info.tensors, window_steps, window, exact, level, info.generation
    )


Rows = tuple[Steps, dict[str, NDArray[np.float64]], dict[str, NDArray[np.bool_]], dict[int, dict[str, Any]]]


def read_rows(directory: Path, info: PartInfo) -> Rows:
    """Read the steps, numbers, flags and details of a part."""
    path = directory / STEPS
    with _reading(path):
        table = pq.read_table(path, use_threads=False, partitioning=None)
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        steps = columns.pop("step").to_numpy().astype(np.int64, copy=False)
        details = columns.pop("details")
        flags = {key: columns.pop(key).to_numpy(zero_copy_only=False).astype(np.bool_, copy=False) for key in FLAGS}
        numbers = {key: column.to_numpy(zero_copy_only=False).astype(np.float64) for key, column in columns.items()}
        _check(path, len(steps) == info.num_rows, f"it has {len(steps)} steps, but {INFO} says {info.num_rows}")
        present = np.flatnonzero(details.is_valid().to_numpy(zero_copy_only=False))
        texts = details.take(pa.array(present)).to_pylist()
        decoded = {int(steps[i]): dict(json.loads(text)) for i, text in zip(present, texts, strict=True)}
        return steps, numbers, flags, decoded


def read_level(directory: Path, info: PartInfo, number: int, with_low: bool = True) -> Level:
    """Read a level of the pyramid.

    Args:
        directory: directory of the part.
        info: its content.
        number: number of the level. If the part has no such level, its coarsest one is read.
        with_low: whether to read the smallest norms too. Otherwise they are replaced by the largest ones.
    """
    path = directory / _level_name(min(number, info.num_levels - 1))
    with _reading(path):
        names = ["first", "last_step", *(["min"] if with_low else []), "max", "last"]
        table = pq.read_table(path, columns=names, use_threads=False, partitioning=None)
        norms = {name: _read_norms(path, table, name, info) for name in names[2:]}
        first, last = (table[name].to_numpy().astype(np.int64, copy=False) for name in names[:2])
        return Level(first, last, norms.get("min", norms["max"]), norms["max"], norms["last"])


def read_window(directory: Path, info: PartInfo) -> tuple[Steps, Norms]:
    """Read the steps and the norms of the window, which are empty without a window."""
    path = directory / WINDOW
    try:
        with _reading(path):
            table = pq.read_table(path, use_threads=False, partitioning=None)
            steps = table["step"].to_numpy().astype(np.int64, copy=False)
            return steps, _read_norms(path, table, "norms", info)
    except FileNotFoundError:
        return np.zeros(0, np.int64), np.zeros((0, len(info.tensors)), np.float32)


def read_cells(directory: Path) -> Cells:
    """Read the norms around outliers."""
    path = directory / EXACT
    with _reading(path):
        table = pq.read_table(path, use_threads=False, partitioning=None)
        return _make_cells(*(table[name].to_numpy() for name in ("step", "tensor", "norm")))


def _make_cells(steps: Any, tensors: Any, norms: Any) -> Cells:
    return Cells(np.asarray(steps, np.int64), np.asarray(tensors, np.int32), np.asarray(norms, np.float32))


def _level_name(number: int) -> str:
    return f"level-{number}.parquet"


def _find_raw(numbers: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
    """Return the columns whose values mostly differ, so that a dictionary would not make them smaller."""
    return {key: "BYTE_STREAM_SPLIT" for key, column in numbers.items() if 2 * len(np.unique(column)) > len(column)}


def _write_norms(path: Path, steps: Mapping[str, Steps], norms: Mapping[str, Norms]) -> None:
    lists = {
        key: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(table).reshape(-1)), table.shape[1])
        for key, table in norms.items()
    }
    # The exponents of norms are similar, so the numbers compress well if all first bytes are stored together, then all
    # second bytes, and so on.
    encodings = dict.fromkeys(steps, "DELTA_BINARY_PACKED")
    encodings |= {f"{key}.list.element": "BYTE_STREAM_SPLIT" for key in norms}
    _write(path, {**steps, **lists}, encodings)


def _write(path: Path, columns: Mapping[str, Any], encodings: Mapping[str, str]) -> None:
    table = pa.table(dict(columns))
    by_dictionary = [
        name for name in table.column_names if name not in encodings and f"{name}.list.element" not in encodings
    ]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=1,
        use_dictionary=by_dictionary,
        column_encoding=dict(encodings),
        write_statistics=["step"] if "step" in table.column_names else False,
    )
    _sync(path)


def _read_norms(path: Path, table: pa.Table, name: str, info: PartInfo) -> Norms:
    column = table[name].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    size = len(table) * len(info.tensors)
    _check(path, len(flat) == size, f"it has {len(flat)} norms, but {INFO} says {size}")
    norms: Norms = flat.reshape(len(table), len(info.tensors))
    return norms


def _check(path: Path, is_right: bool, problem: str) -> None:
    if not is_right:
        raise RunError(f"{path} does not belong to this log: {problem}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise a `RunError` about a file that is damaged or has another format."""
    try:
        yield
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise RunError(f"{path} is not a file of this log: it has no {error.args[0]}") from None
    except (OSError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        text = str(error).splitlines()
        raise RunError(
            f"{path} is damaged, or not a file of this log: {text[0] if text else type(error).__name__}"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
