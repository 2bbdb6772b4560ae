"""Keep the parts of a run in a directory: add one, merge old ones, and survive a crash at any moment."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..analysis.errors import RunError
from .files import WINDOW, PartInfo, read_info, read_part, write_part
from .part import MAX_GENERATION, Part, merge

__all__ = ["Store", "StoredPart"]

NAME = re.compile(r"(\d{8})-(\d{8})")

NUM_MERGED = 8
"""Number of parts of one generation that are merged into one of the next."""

WINDOW_ROWS = 4096
"""Number of the last steps whose norms are all kept."""

MAX_ATTEMPTS = 20
"""Maximum number of times that a reader lists the parts, because a writer may merge some while they are read."""


@dataclass(frozen=True)
class StoredPart:
    """A part on the disk.

    Args:
        first: number of the first part that was merged into it.
        last: number of the last part that was merged into it.
        path: path of its directory.
        info: its content.
    """

    first: int
    last: int
    path: Path
    info: PartInfo


class Store:
    """Directory of the parts of a run.

    Args:
        path: path of the directory, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Parts never change, and their names are not reused, so their contents can be cached. Reading the names of
        # 5,000 tensors takes 2 ms.
        self._infos: dict[Path, PartInfo] = {}

    def parts(self) -> list[StoredPart]:
        """Return the parts in order.

        Raises:
            RunError: a part is missing or damaged.
        """
        for attempt in range(MAX_ATTEMPTS):
            names = self._names()
            try:
                listed = _uncovered(names)
                self._infos = {path: self._infos.get(path) or read_info(path) for _, _, path in listed}
                return [StoredPart(first, last, path, self._infos[path]) for first, last, path in listed]
            except FileNotFoundError as error:
                if attempt == MAX_ATTEMPTS - 1 or names == self._names():
                    raise RunError(f"{error.filename} is missing") from None
        raise AssertionError

    def last_number(self) -> int:
        """Return the number of the last part, or 0 if there is none."""
        return max((last for _, last, _ in self._names()), default=0)

    def add(self, part: Part) -> None:
        """Store a part after all others, and merge old parts if there are many."""
        number = self.last_number() + 1
        first, restarted = number, list[Part]()
        for stored in reversed(self.parts()):
            if stored.info.last < part.steps[0]:
                break
            restarted.insert(0, read_part(stored.path))
            first = stored.first
        if restarted:
            part = merge([*restarted, part], max(one.generation for one in restarted))
        self._write(first, number, part)
        self._drop_windows()
        while self._merge_oldest():
            pass

    def clean(self) -> None:
        """Remove the leftovers of a crash: unfinished parts, and parts that were merged."""
        if not self.path.is_dir():
            return
        needed = {path for _, _, path in _uncovered(self._names())}
        for path in self.path.iterdir():
            if path not in needed and (path.name.startswith(".") or NAME.fullmatch(path.name)):
                shutil.rmtree(path, ignore_errors=True)

    def _names(self) -> list[tuple[int, int, Path]]:
        if not self.path.is_dir():
            return []
        found = ((NAME.fullmatch(path.name), path) for path in self.path.iterdir())
        return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)

    def _write(self, first: int, last: int, part: Part) -> None:
        self.path.mkdir(exist_ok=True)
        name = f"{first:08}-{last:08}"
        temporary = self.path / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_part(temporary, part)
        temporary.rename(self.path / name)
        self.clean()

    def _drop_windows(self) -> None:
        """Remove the norms of single steps, except for those of the last parts."""
        num_rows = 0
        for stored in reversed(self.parts()):
            if num_rows >= WINDOW_ROWS:
                (stored.path / WINDOW).unlink(missing_ok=True)
            num_rows += stored.info.num_rows

    def _merge_oldest(self) -> bool:
        """Merge eight parts of one generation that have no window, if there are eight."""
        parts = [part for part in self.parts() if not (part.path / WINDOW).exists()]
        for generation in range(MAX_GENERATION):
            # Parts of a generation are next to each other, and higher generations come first.
            same = list(_run_of(parts, generation))
            if len(same) >= NUM_MERGED:
                chosen = same[:NUM_MERGED]
                merged = merge([read_part(part.path) for part in chosen], generation + 1)
                self._write(chosen[0].first, chosen[-1].last, merged)
                return True
        return False


def _run_of(parts: Sequence[StoredPart], generation: int) -> Iterator[StoredPart]:
    start = next((i for i, part in enumerate(parts) if part.info.generation == generation), len(parts))
    return takewhile(lambda part: part.info.generation == generation, parts[start:])


def _uncovered(names: Sequence[tuple[int, int, Path]]) -> list[tuple[int, int, Path]]:
    """Return the parts that no merged part contains.

    Raises:
        RunError: a part is missing.
    """
    kept: list[tuple[int, int, Path]] = []
    # The widest of the parts with the same beginning comes first.
    for first, last, path in sorted(names, key=lambda name: (name[0], -name[1])):
        if kept and last <= kept[-1][1]:
            continue
        expected = kept[-1][1] + 1 if kept else 1
        if first != expected:
            raise RunError(f"{path.parent} has no part {expected}, but {path.name}. Restore the missing parts")
        kept.append((first, last, path))
    return kept
