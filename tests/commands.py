"""Run commands that must succeed, and read what they print."""

from __future__ import annotations

import subprocess
from typing import Any

__all__ = ["output"]


def output(*command: str, **options: Any) -> str:
    """What a command prints that has to go well; `options` are those of `subprocess.run`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
