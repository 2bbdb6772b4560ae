"""Read a run again whenever its files change."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..analysis.errors import RunError, UnreadableLinesWarning
from ..analysis.log import Keys, Log, read
from .marker import is_running

__all__ = ["Follower", "Signature", "read_growing", "sign"]

IDLE_SECONDS = 600.0
"""Time without a change after which a run counts as ended, if no recorder has marked it as running."""

SKIPPED = {"checkpoints"}
"""Names of directories in a run whose files are not part of its log."""

Signature = tuple[tuple[str, int, int], ...]
"""Path, time of the last change and size of each file."""


class Follower:
    """Reads a run whenever its files have changed.

    Args:
        path: directory of a run, or file.
        keys: names of the columns in a log of another tool.
    """

    def __init__(self, path: Path, keys: Keys) -> None:
        self._path, self._keys = path, keys
        self._signature: Signature | None = None
        self.log: Log | None = None
        """The run as it was read last. None before it has a step."""
        self.seconds = 0.0
        """Seconds that reading it took."""

    def poll(self) -> bool:
        """Read the run if it has changed, and return whether it has.

        Raises:
            RunError: the run has ended and has no steps, or is not a run at all.
        """
        signature, is_over = sign(self._path), self.is_over
        if signature == self._signature:
            return False
        begin = time.monotonic()
        try:
            self.log = read_growing(self._path, None, self._keys)
        except RunError:
            if is_over:
                raise
        self._signature, self.seconds = signature, time.monotonic() - begin
        return True

    @property
    def is_over(self) -> bool:
        """True if the run has ended, according to its directory."""
        directory = self._path if self._path.is_dir() else self._path.parent
        running = is_running(directory)
        if running is not None:
            return not running
        if (directory / "summary.json").exists():
            return True
        return time.time() - max((changed for _, changed, _ in sign(self._path)), default=0) / 1e9 > IDLE_SECONDS


def read_growing(path: Path, name: str | None, keys: Keys) -> Log:
    """Read a run that is being written, see `distclip.monitor.analysis.log.read`."""
    with warnings.catch_warnings():
        # The last line may be incomplete while it is being written.
        warnings.simplefilter("ignore", UnreadableLinesWarning)
        return read(path, name, keys)


def sign(path: Path) -> Signature:
    """Return a value that changes when a file of a run changes."""
    return tuple(sorted(_stats(path, 2)))


def _stats(path: Path, depth: int) -> Iterator[tuple[str, int, int]]:
    try:
        if not path.is_dir():
            stat = path.stat()
            yield str(path), stat.st_mtime_ns, stat.st_size
        elif depth:
            with os.scandir(path) as entries:
                names = [
                    entry.name for entry in entries if not entry.name.startswith(".") and entry.name not in SKIPPED
                ]
            for name in names:
                yield from _stats(path / name, depth - 1)
    except OSError:
        # The file was replaced or removed in the meantime.
        return
