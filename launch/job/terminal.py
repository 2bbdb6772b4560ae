"""Print what a run shows on the terminal of rank 0."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

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
        self.console.print(text, style="bold", soft_wrap=True, highlight=False)

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
        self.console.print(
            f"step {row['step']:>{len(str(num_steps))}}/{num_steps}  loss {row['loss']:<7.4g} "
            f"norm {row['norm']:<8.3g} coef {row['coef']:<8.3g} clipped {clip_rate:.1%}",
            highlight=False,
        )

    def results(self, summaries: Mapping[str, Summary], note: str) -> None:
        """Print the closing table, the causes of non-finite steps, the note and the run directory."""
        for table in build_tables(summaries, self.console):
            self.console.print(table)
        for name, run in summaries.items():
            if run.incidents:
                title = f"non-finite gradients{name and f' ({name})'}"
                culprits = "; ".join(describe_culprits(run, 3)) or "the norm overflowed"
                self.console.print(f"{title}: {culprits}", soft_wrap=True, highlight=False, markup=False)
        self.paragraph(note)
        # Paths are printed outside of the table and never wrapped, so that they can be copied.
        directory = os.path.commonpath([run.directory for run in summaries.values()])
        command = Path(sys.executable).with_name("distclip")
        if command.is_relative_to(Path.cwd()):
            command = command.relative_to(Path.cwd())
        self.console.print(f"run directory: {directory}", soft_wrap=True, highlight=False)
        self.console.print(f"plot its norms: {command} report {directory}", soft_wrap=True, highlight=False)

    def audit(self, report: Audit) -> None:
        """Print how the model is spread over the ranks."""
        self.console.print(report.to_text(self.console.width), soft_wrap=True, highlight=False, markup=False)

    def paragraph(self, text: str) -> None:
        """Print a paragraph. It is wrapped on a terminal only."""
        if text:
            self.console.print(text.strip(), soft_wrap=not self.console.is_terminal, highlight=False, markup=False)
