"""Mark the directory of a run as being written, so that other programs find out when the run ends."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["FILE", "is_running", "mark_ended", "mark_running"]

FILE = "recorder.json"
"""Name of the file in the directory of a run."""


def mark_running(directory: Path) -> None:
    """Write that this process records the run. A directory that cannot be written is left as it is."""
    _write(directory, {"pid": os.getpid(), "host": socket.gethostname(), "started": round(time.time(), 3)})


def mark_ended(directory: Path) -> None:
    """Write that the run has ended, unless another process now records it."""
    known = _read(directory)
    if known is not None and known.get("pid") == os.getpid():
        _write(directory, known | {"ended": round(time.time(), 3)})


def is_running(directory: Path) -> bool | None:
    """Return whether a process records the run, or None if the directory does not show it.

    A killed process of this host counts as ended. A process of another host counts as ended only if it has written so
    itself.
    """
    known = _read(directory)
    if known is None:
        return None
    if "ended" in known:
        return False
    pid = known.get("pid")
    # On Windows, signal 0 ends a process.
    if known.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0 or os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # The process belongs to another user.
        return True
    return True


def _write(directory: Path, content: dict[str, Any]) -> None:
    # The file is replaced atomically, because other programs may read it at any time.
    with suppress(OSError):
        path = directory / f".{FILE}.{os.getpid()}"
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
        path.replace(directory / FILE)


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
