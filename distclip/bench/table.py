"""Print the results: one table per case, a progress bar, one Markdown table of all cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.measure import measure_renderables
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .._console import Screen
from .results import Outcome, Standing

__all__ = ["Terminal", "markdown"]

COLUMNS = ["median ms", "x torch", "GB/s", "norm error", "written", "collectives", "extra memory", "syncs", "kernels"]
"""Columns after the competitor's name. A narrow terminal omits the last ones."""


class Terminal(Screen):
    """Terminal or pipe that shows the results: see `Screen`."""

    def header(self, *parts: Mapping[str, object]) -> None:
        """Print machine and versions, one line for each part."""
        for part in parts:
            self.line(", ".join(f"{key} {value}" for key, value in part.items()))

    def bar(self) -> Progress:
        """Return a progress bar. It is invisible on a pipe, where every update would be a line."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def outcome(self, outcome: Outcome) -> None:
        """Print the table of a case, in as many columns as fit."""
        ranks = f" on each of {outcome.world} ranks" if outcome.world > 1 else ""
        self.line("")
        self.line(outcome.name, "bold")
        self.line(f"{outcome.title}; {amount(outcome.bytes)}{ranks}, threads {outcome.threads}")
        cells = [_cells(outcome, standing) for standing in outcome.standings]
        columns = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
        while len(columns) > 1 and self._width(_table(outcome, cells, columns)) > self.console.width:
            columns.pop()
        self.console.print(_table(outcome, cells, columns))
        for standing in outcome.standings:
            if standing.error is not None:
                self.line(f"{standing.name} is excluded: {standing.error}")

    def _width(self, table: Table) -> int:
        return measure_renderables(self.console, self.console.options.update(max_width=10_000), [table]).maximum


def amount(size: int) -> str:
    """Format bytes with decimal units, like bandwidths."""
    for unit, factor in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return one Markdown table of all cases: distclip against the baseline."""
    lines = ["| case | torch ms | distclip ms | ratio |", "|---|--:|--:|--:|"]
    for outcome in outcomes:
        own = [standing for standing in outcome.standings if standing.own]
        for standing in own:
            name = f"`{outcome.name}`" + (f", {standing.name}" if len(own) > 1 else "")
            numbers = (outcome.milliseconds(outcome.standings[0]), outcome.milliseconds(standing))
            ratio = outcome.ratio(standing)
            lines.append(f"| {name} | {_ms(numbers[0])} | {_ms(numbers[1])} | {_ratio(ratio)} |")
    return "\n".join(lines)


def _table(outcome: Outcome, cells: list[list[str]], columns: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for i in columns:
        table.add_column(COLUMNS[i], justify="right", no_wrap=True)
    for standing, row in zip(outcome.standings, cells, strict=True):
        table.add_row(standing.name, *(row[i] for i in columns), style="bold" if standing.own else None)
    return table


def _cells(outcome: Outcome, standing: Standing) -> list[str]:
    rate, counts = outcome.rate(standing), standing.counts
    # The rate of a case with less than 1 MB is not meaningful.
    shown = "" if rate is None or outcome.bytes < 1e6 else f"{rate:.3g}"
    timed = [_ms(outcome.milliseconds(standing)), _ratio(outcome.ratio(standing)), shown]
    if counts is None:
        return [*timed, "", "", "", "", "", ""]
    error = "" if counts.norm_error is None else f"{counts.norm_error:.0e}"
    collectives = str(counts.collectives) if outcome.world > 1 else ""
    device = ["" if number is None else str(number) for number in (counts.host_syncs, counts.kernels)]
    return [*timed, error, amount(counts.bytes_written), collectives, amount(counts.peak_bytes), *device]


def _ms(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
