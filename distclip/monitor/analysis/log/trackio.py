"""Read the runs of a Trackio database, without Trackio."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ....errors import printable
from ..errors import RunError
from ..formatting import format_list
from .columns import Line

__all__ = ["list_runs", "read_run", "split_run"]

SUFFIX = ".db"


def split_run(path: Path) -> tuple[Path, str] | None:
    """Split the path of a run in a database into the paths of both, or return None for other paths.

    The run `one` of the project `llm` is `llm.db/one`.
    """
    for parent in path.parents:
        if parent.suffix == SUFFIX and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def list_runs(database: Path) -> list[Path]:
    """Return the paths of all runs of a database, in the order of their first steps.

    Raises:
        RunError: the file is not a database of Trackio, or has no run.
    """
    names = [
        str(name) for (name,) in _query(database, "SELECT run_name FROM metrics GROUP BY run_name ORDER BY MIN(id)")
    ]
    if not names:
        raise RunError(f"{database} is a Trackio database without steps")
    return [database / name for name in names]


def read_run(database: Path, run: str) -> list[Line]:
    """Read the rows of a run.

    Raises:
        RunError: the file is not a database of Trackio, or has no such run.
    """
    found = _query(database, "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", [run])
    if not found:
        names = format_list([printable(path.relative_to(database)) for path in list_runs(database)], 12)
        raise RunError(f"{database} has no run {printable(run)}. It has {names}")
    rows = []
    for step, text in found:
        try:
            metrics = json.loads(text)
        except (TypeError, ValueError):
            continue
        if isinstance(metrics, dict):
            rows.append({**metrics, "step": step})
    return rows


def _query(database: Path, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    uri = f"file:{quote(str(database))}?mode=ro"
    # SQLite needs a file next to a database that was open when its program ended. Some directories are read-only.
    if not os.access(database.parent, os.W_OK):
        uri += "&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise RunError(f"{database} is not a Trackio database: {error}") from None
