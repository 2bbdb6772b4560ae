"""Find the runs that a command line refers to, and name them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...jsonl import COLUMNS
from ..errors import RunError
from .foreign import find_file
from .trackio import find_databases, list_runs, split_run
from .wandb import SUFFIX as WANDB
from .wandb import find_records

__all__ = ["LINES", "find_runs", "find_store", "name_runs"]

LINES = "metrics.jsonl"
"""Name of a recorder's file. A directory with this file is a run."""

UUID = re.compile(r"[_-]?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Identifier in the name of a directory, with the separator before it."""

MAX_DEPTH = 3
"""Number of levels below a directory that are searched. Hydra's multirun uses two, and named runs use three."""


def find_runs(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Find the runs at these paths.

    Args:
        paths: one path or several, each of a directory with a `metrics.jsonl` or a log of another tool, a file of JSON
            lines, a Trackio database, or a directory that contains such directories up to three levels below.

    Returns:
        Directories and files in the order given. The runs below one directory are sorted, and no run is listed twice.

    Raises:
        RunError: there is no run at one of the paths.
    """
    by_path: dict[Path, Path] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for run in _runs_at(Path(path)):
            by_path.setdefault(run.resolve(), run)
    return list(by_path.values())


def find_store(file: Path) -> Path | None:
    """Return the directory of the columns of a recorder's file, or None if all steps are in the file."""
    store = file.with_name(COLUMNS)
    return store if file.name == LINES and store.is_dir() else None


def name_runs(runs: Sequence[Path]) -> list[str]:
    """Return short, distinct names of runs.

    The names are the paths below the common directory. UUIDs and last parts that all of them share are removed if the
    names stay distinct. A single run has the name of its directory.
    """
    directories = [_directory(run.resolve()) for run in runs]
    common = Path(os.path.commonpath(directories)) if len(directories) > 1 else directories[0].parent
    names = [path.name if path == common else str(path.relative_to(common)) for path in directories]
    names = _if_distinct([UUID.sub("", name) for name in names], names)
    parts = [name.split("/") for name in names]
    while len(names) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return _if_distinct(["/".join(part) for part in parts], names)


def _if_distinct(shorter: list[str], names: list[str]) -> list[str]:
    """Return shorter names, unless one is empty or two distinct names became equal."""
    return shorter if all(shorter) and len(set(shorter)) == len(set(names)) else names


def _directory(run: Path) -> Path:
    return run.parent if run.name == LINES or run.suffix == WANDB else run


def _runs_at(path: Path) -> list[Path]:
    try:
        if path.suffix == ".db" and path.is_file():
            return list_runs(path)
        if split_run(path) is not None:
            return [path]
        if not path.exists():
            raise RunError(f"{path} does not exist")
        if not path.is_dir():
            return [path]
        runs = sorted(_runs_below(path, MAX_DEPTH))
        content = [entry.name + "/" * entry.is_dir() for entry in path.iterdir() if not entry.name.startswith(".")]
        content.sort(key=lambda name: (not name.endswith(".jsonl"), name))
        # If a job uses W&B or Trackio next to a recorder, both have the same steps, so the recorder's files suffice.
        runs = runs or [run for database in find_databases(path) for run in list_runs(database)] or find_records(path)
    except OSError as error:
        raise RunError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    if not runs:
        some = ", ".join(content[:5]) + (", …" if len(content) > 5 else "")
        raise RunError(
            f"{path} is not a run: neither it nor a directory up to {MAX_DEPTH} levels below has a {LINES}, or a log "
            "of TensorBoard, transformers, Lightning, Trackio or W&B "
            f"(it contains {some or 'nothing'})"
        )
    return runs


def _runs_below(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / LINES).is_file() or (directory / COLUMNS).is_dir() or find_file(directory) is not None:
        yield directory
    elif depth:
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _runs_below(entry, depth - 1)
