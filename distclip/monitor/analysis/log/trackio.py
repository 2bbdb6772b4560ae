"""Read the runs of a Trackio database, without Trackio."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ....errors import printable
from ..errors import RunError
from ..formatting import format_list
from .columns import Line

__all__ = ["find_databases", "list_runs", "read_run", "split_run"]

SUFFIX = ".db"


def split_run(path: Path) -> tuple[Path, str] | None:
    """Split the path of a run in a database into the paths of both, or return None for other paths.

    The run `one` of the project `llm` is `llm.db/one`.
    """
    for parent in path.parents:
        if parent.suffix == SUFFIX and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def find_databases(directory: Path) -> list[Path]:
    """Return the Trackio databases in a directory, sorted. Other files with that suffix are left out."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.is_file() and _has_runs(path))


def list_runs(database: Path) -> list[Path]:
    """Return the paths of all runs of a database, in the order of their first steps.

    Raises:
        RunError: the file is not a database of Trackio, or has no run.
    """
    names = _find_names(database)
    if not names:
        raise RunError(f"{database} is a Trackio database without steps")
    return [database / name for name in names]


def read_run(database: Path, run: str) -> list[Line]:
    """Read the rows of a run.

    Raises:
        RunError: the file is not a database of Trackio, or has no such run.
    """
    names = _find_names(database)
    if run not in names:
        known = format_list(list(map(printable, names)), 12) or "none"
        raise RunError(f"{database} has no run {printable(run)}. It has {known}")
    condition, values = names[run]
    rows = []
    for step, text in _query(database, f"SELECT step, metrics FROM metrics WHERE {condition} ORDER BY id", values):
        try:
            metrics = json.loads(text)
        except (TypeError, ValueError):
            continue
        if isinstance(metrics, dict):
            rows.append({**metrics, "step": step})
    return rows


def _find_names(database: Path) -> dict[str, tuple[str, list[Any]]]:
    """Return the SQL condition of each run's rows by the run's name, in the order of first steps.

    A name that several runs have is followed by the beginning of the run's id.
    """
    columns = {name for (name,) in _query(database, "SELECT name FROM pragma_table_info('metrics')")}
    key = "run_id" if "run_id" in columns else "NULL"
    runs = _query(database, f"SELECT run_name, {key} FROM metrics GROUP BY 1, 2 ORDER BY MIN(id)")
    counts = Counter(name for name, _ in runs)
    names: dict[str, tuple[str, list[Any]]] = {}
    for name, run_id in runs:
        if counts[name] == 1:
            names[str(name)] = "run_name = ?", [name]
        else:
            names[f"{name} {str(run_id)[:8]}"] = "run_name = ? AND run_id = ?", [name, run_id]
    return names


def _has_runs(database: Path) -> bool:
    with suppress(RunError):
        return bool(_find_names(database))
    return False


def _query(database: Path, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    uri = f"file:{quote(str(database))}?mode=ro"
    # If a database was open when its program ended, SQLite creates a file next to it. Some directories are read-only.
    if not os.access(database.parent, os.W_OK):
        uri += "&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise RunError(f"{database} is not a Trackio database: {error}") from None
