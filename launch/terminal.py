"""What a run shows on the terminal; nothing on ranks other than 0."""

import os
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

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

    def outcomes(self, outcomes: Mapping[str, Outcome]) -> None:
        """The closing table: a column per run."""
        table = Table(show_header=len(outcomes) > 1)
        table.add_column()
        for name in outcomes:
            table.add_column(name, justify="right")
        runs = list(outcomes.values())
        table.add_row("steps", *(str(run.steps) for run in runs))
        table.add_row("held-out loss", *(f"{run.held_out:.3f}" for run in runs), style="bold")
        table.add_row("  of a blind guess", *(f"{run.guess:.3f}" for run in runs))
        if any(run.r2 is not None for run in runs):
            table.add_row("held-out R2", *("" if run.r2 is None else f"{run.r2:.3g}" for run in runs))
        for level in runs[0].norms:
            table.add_row(f"norm {level}", *(f"{run.norms[level]:.3g}" for run in runs))
        if any(run.nonfinite for run in runs):
            table.add_row("norm not finite", *(f"{run.nonfinite} steps" for run in runs))
        for title, counts in {"skipped": [r.skipped for r in runs], "zeroed": [r.zeroed for r in runs]}.items():
            if any(counts):
                table.add_row(title, *(f"{count} steps" for count in counts))
        table.add_row("clip rate", *(f"{run.clip_rate:.1%}" for run in runs))
        table.add_row("time", *(f"{run.seconds:.1f} s" for run in runs))
        self.console.print(table)
        for name, run in outcomes.items():
            if run.incidents:
                title = f"not finite{name and f' ({name})'}"
                self.console.print(f"{title}: {'; '.join(culprits(run, 3))}", soft_wrap=True, highlight=False)
        # A path is for copying: outside the table, never folded.
        self.console.print(
            f"run directory: {os.path.commonpath([run.directory for run in runs])}",
            soft_wrap=True,
            highlight=False,
        )


def culprits(run: Outcome, most: int) -> list[str]:
    """The first few parameters whose gradients were not finite: `0.weight: 3 NaN on rank 1 (step 12)`."""
    found = [(each, incident["step"]) for incident in run.incidents for each in incident["culprits"]]
    lines = []
    for each, step in found[:most]:
        numbers = ", ".join(f"{n} {what}" for n, what in ((each["nans"], "NaN"), (each["infs"], "inf")) if n)
        ranks = ", ".join(map(str, each["ranks"]))
        on = f" on rank{'s' * (len(each['ranks']) > 1)} {ranks}" if ranks else ""
        lines.append(f"{each['name']}: {numbers}{on} (step {step})")
    return [*lines, f"and {len(found) - most} more"] if len(found) > most else lines
