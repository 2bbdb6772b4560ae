"""Print the output of a run on the terminal of rank 0."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from distclip._console import cell
from distclip.auditing import Audit

from .log import Row, Summary
from .table import build_tables, describe_culprits


class Terminal:
    """Terminal output of rank 0. Other ranks print nothing."""

    def __init__(self, rank: int) -> None:
        self.console = Console(quiet=rank != 0)
        if not self.console.is_terminal:
            # A pipe has no width. The default of 80 columns is too narrow for a table of several runs.
            self.console.width = 120

    def title(self, text: str) -> None:
        """Print a title in bold."""
        self._line(text, "bold")

    def progress_bar(self, enabled: bool) -> Progress:
        """Return a progress bar. It is hidden on a pipe, where every update would be a line."""
        return Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (enabled and self.console.is_terminal),
        )

    def step(self, row: Row, num_steps: int, clip_rate: float) -> None:
        """Print one line about a step."""
        self._line(
            f"step {row['step']:>{len(str(num_steps))}}/{num_steps}  loss {row['loss']:<7.4g} "
            f"norm {row['norm']:<8.3g} coef {row['coef']:<8.3g} clipped {clip_rate:.1%}"
        )

    def results(self, summaries: Mapping[str, Summary], note: str) -> None:
        """Print the closing table, the causes of non-finite steps, the note and the run directory."""
        for table in build_tables(summaries, self.console):
            self.console.print(table)
        for name, run in summaries.items():
            if run.incidents:
                title = f"non-finite gradients{name and f' ({name})'}"
                culprits = "; ".join(describe_culprits(run, 3)) or "the norm overflowed"
                self._line(f"{title}: {culprits}")
        self.paragraph(note)
        # Paths are printed outside of the table and never wrapped, so that they can be copied.
        directory = os.path.commonpath([run.directory for run in summaries.values()])
        command = Path(sys.executable).with_name("distclip")
        if command.is_relative_to(Path.cwd()):
            command = command.relative_to(Path.cwd())
        self._line(f"run directory: {directory}")
        self._line(f"plot its norms: {command} report {quote(directory)}")

    def audit(self, report: Audit) -> None:
        """Print the distribution of the model over the ranks."""
        for line in report.to_text(self.console.width).splitlines():
            self._line(line)

    def paragraph(self, text: str) -> None:
        """Print a paragraph. It is wrapped only on a terminal."""
        if text:
            for line in text.strip().splitlines():
                self.console.print(cell(line), soft_wrap=not self.console.is_terminal, highlight=False)

    def _line(self, text: str, style: str = "") -> None:
        """Print a line that is never wrapped. Names of runs and parameters in it are plain text."""
        self.console.print(cell(text, style), soft_wrap=True, highlight=False)
