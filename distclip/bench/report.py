"""All cases of one call of the command, and its file."""

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
    """What was measured, where, and with what.

    Args:
        path: of the JSON file; None for none.
        machine: see `machine.machine`.
        versions: see `machine.versions`.
        command: what was typed.
        outcomes: so far.
    """

    path: Path | None
    machine: Mapping[str, str | int]
    versions: Mapping[str, str]
    command: str = field(default_factory=command_line)
    outcomes: list[Outcome] = field(default_factory=list)

    def save(self) -> None:
        """Write the file anew, so that a call that is broken off leaves what it has.

        Raises:
            BenchError: it cannot be written.
        """
        if self.path is None:
            return
        cases = [outcome.as_json() for outcome in self.outcomes]
        content = {"machine": self.machine, "versions": self.versions, "command": self.command, "cases": cases}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(content) + "\n")
        except OSError as error:
            raise BenchError(f"--json {self.path}: {error.strerror}.") from error
