"""What is printed: a table per case, a progress bar, one Markdown table of all cases."""

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
"""Beside the contestant's name; where there is no room, the last ones are left out."""


class Terminal(Screen):
    """Where everything is shown: see `Screen`."""

    def header(self, *parts: Mapping[str, object]) -> None:
        """What it runs on, a line for each part."""
        for part in parts:
            self.line(", ".join(f"{key} {value}" for key, value in part.items()))

    def bar(self) -> Progress:
        """A progress bar, or on a pipe (where every update would be a line) an invisible one."""
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
        """The table of a case, in as many columns as there is room for."""
        ranks = f" on each of {outcome.world} ranks" if outcome.world > 1 else ""
        self.line("")
        self.line(outcome.name, "bold")
        self.line(f"{outcome.title}; {amount(outcome.bytes)}{ranks}, threads {outcome.threads}")
        cells = [_cells(outcome, standing) for standing in outcome.standings]
        there = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
        while len(there) > 1 and self._width(_table(outcome, cells, there)) > self.console.width:
            there.pop()
        self.console.print(_table(outcome, cells, there))
        for standing in outcome.standings:
            if standing.error is not None:
                self.line(f"{standing.name} takes no part: {standing.error}")

    def _width(self, table: Table) -> int:
        return measure_renderables(self.console, self.console.options.update(max_width=10_000), [table]).maximum


def amount(size: int) -> str:
    """Bytes, as one reads them: decimal, as bandwidths are."""
    for unit, factor in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One table of all cases: distclip against the first contestant."""
    lines = ["| case | torch ms | distclip ms | ratio |", "|---|--:|--:|--:|"]
    for outcome in outcomes:
        own = [standing for standing in outcome.standings if standing.own]
        for standing in own:
            name = f"`{outcome.name}`" + (f", {standing.name}" if len(own) > 1 else "")
            numbers = (outcome.milliseconds(outcome.standings[0]), outcome.milliseconds(standing))
            ratio = outcome.ratio(standing)
            lines.append(f"| {name} | {_ms(numbers[0])} | {_ms(numbers[1])} | {_ratio(ratio)} |")
    return "\n".join(lines)


def _table(outcome: Outcome, cells: list[list[str]], there: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for i in there:
        table.add_column(COLUMNS[i], justify="right", no_wrap=True)
    for standing, row in zip(outcome.standings, cells, strict=True):
        table.add_row(standing.name, *(row[i] for i in there), style="bold" if standing.own else None)
    return table


def _cells(outcome: Outcome, standing: Standing) -> list[str]:
    rate, counts = outcome.rate(standing), standing.counts
    # The rate of next to nothing says nothing.
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
