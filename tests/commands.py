"""Run commands that must succeed, and return what they print."""

from __future__ import annotations

import subprocess
from typing import Any

__all__ = ["output"]


def output(*command: str, **options: Any) -> str:
    """Run a command and return its standard output. It must exit with 0.

    Args:
        command: program and arguments.
        options: arguments of `subprocess.run`.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
