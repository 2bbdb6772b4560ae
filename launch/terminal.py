"""What a run shows on the terminal; nothing on ranks other than 0."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import closing
from record import Outcome, Row


class Terminal:
    def __init__(self, rank: int) -> None:
        self.console = Console(quiet=rank != 0)
        if not self.console.is_terminal:
            self.console.width = 120  # a pipe has no width of its own, and 80 folds a table of several runs

    def title(self, text: str) -> None:
        self.console.print(text, style="bold", soft_wrap=True, highlight=False)

    def bar(self, wanted: bool) -> Progress:
        """A progress bar, or on a pipe (where every update would be a line) an invisible one."""
        return Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (wanted and self.console.is_terminal),
        )

    def line(self, row: Row, steps: int, clip_rate: float) -> None:
        self.console.print(
            f"step {row['step']:>{len(str(steps))}}/{steps}  loss {row['loss']:<7.4g} "
            f"norm {row['norm']:<8.3g} coef {row['coef']:<8.3g} clipped {clip_rate:.1%}",
            highlight=False,
        )

    def outcomes(self, outcomes: Mapping[str, Outcome], note: str) -> None:
        """The closing table, and what it shows."""
        for table in closing.tables(outcomes, self.console):
            self.console.print(table)
        for name, run in outcomes.items():
            if run.incidents:
                title = f"not finite{name and f' ({name})'}"
                self.console.print(f"{title}: {'; '.join(closing.culprits(run, 3))}", soft_wrap=True, highlight=False)
        self.say(note)
        # Paths are for copying: outside the table, never folded.
        runs = os.path.commonpath([run.directory for run in outcomes.values()])
        command = Path(sys.executable).with_name("distclip")
        if command.is_relative_to(Path.cwd()):
            command = command.relative_to(Path.cwd())
        self.console.print(f"run directory: {runs}", soft_wrap=True, highlight=False)
        self.console.print(f"to see its norms: {command} report {runs}", soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """A paragraph, folded on a terminal only."""
        if text:
            self.console.print(text.strip(), soft_wrap=not self.console.is_terminal, highlight=False, markup=False)
