"""Which runs a command line means."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import RunError

__all__ = ["LINES", "find_runs", "names_of"]

LINES = "metrics.jsonl"
"""The file that makes a directory a run."""

DEPTH = 3
"""Levels below a directory at which runs are looked for: Hydra's multirun puts them at the second, named ones below."""


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs that are meant: a run itself, or all runs in a directory.

    Args:
        paths: directories with a `metrics.jsonl`, files of JSON lines, or directories with such directories in them, up
            to three levels down.

    Returns:
        Directories and files in the order given, those of one directory sorted, none twice.

    Raises:
        RunError: one of them is nothing of the kind.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for run in _runs(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def names_of(runs: Sequence[Path]) -> list[str]:
    """What tells runs apart: their paths below the directory that they have in common; of a single one, its name."""
    whole = [_place(run.resolve()) for run in runs]
    common = Path(os.path.commonpath(whole)) if len(whole) > 1 else whole[0].parent
    return [path.name if path == common else str(path.relative_to(common)) for path in whole]


def _place(run: Path) -> Path:
    return run.parent if run.name == LINES else run


def _runs(path: Path) -> list[Path]:
    try:
        if not path.exists():
            raise RunError(f"{path} does not exist")
        if not path.is_dir():
            return [path]
        runs = sorted(_below(path, DEPTH))
        there = [each.name + "/" * each.is_dir() for each in path.iterdir() if not each.name.startswith(".")]
        there.sort(key=lambda name: (not name.endswith(".jsonl"), name))
    except OSError as error:
        raise RunError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    if not runs:
        some = ", ".join(there[:5]) + (", …" if len(there) > 5 else "")
        raise RunError(
            f"{path} is not a run: neither it nor a directory up to {DEPTH} levels below has a {LINES} "
            f"(it has {some or 'nothing in it'})"
        )
    return runs


def _below(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / LINES).is_file():
        yield directory
    elif depth:
        for each in directory.iterdir():
            if each.is_dir() and not each.name.startswith("."):
                yield from _below(each, depth - 1)
