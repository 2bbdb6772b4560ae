"""Collect the outcomes of all cases of one command, and write its JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BenchError
from .machine import command_line
from .results import Outcome

__all__ = ["Report"]


@dataclass
class Report:
    """Outcomes of all cases, with the machine and the versions.

    Args:
        path: path of the JSON file. None for no file.
        machine: see `machine.machine`.
        versions: see `machine.versions`.
        command: command that repeats the benchmark.
        outcomes: outcomes of the cases so far.
    """

    path: Path | None
    machine: Mapping[str, str | int]
    versions: Mapping[str, str]
    command: str = field(default_factory=command_line)
    outcomes: list[Outcome] = field(default_factory=list)

    def save(self) -> None:
        """Rewrite the file, so that an interrupted command keeps its finished cases.

        Raises:
            BenchError: the file cannot be written.
        """
        if self.path is None:
            return
        cases = [outcome.as_json() for outcome in self.outcomes]
        content = {"machine": self.machine, "versions": self.versions, "command": self.command, "cases": cases}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(content) + "\n")
        except OSError as error:
            raise BenchError(f"--json {self.path}: {error.strerror}. Pass a path that can be written.") from error
