"""The same facts in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table
from rich.text import Text

from ..._console import Screen
from ..analysis.log import Log
from .facts import Fact, facts
from .palette import Style, styles
from .verdicts import Verdict, verdicts
from .words import NOTHING, plain, shortened

__all__ = ["overview"]


def overview(logs: Sequence[Log], console: Console, judged: Sequence[Verdict] | None = None) -> None:
    """Print a table with a column per run, and the findings, a line each.

    Args:
        logs: of the runs, at least one.
        console: where to; one that is not a terminal becomes 120 wide.
        judged: see `write_page`.
    """
    console = Screen(console).console
    runs, judged = styles([log.name for log in logs]), judged or verdicts(logs)
    found = facts(logs, judged)
    start = 0
    while start < len(runs):
        stop = start + 1
        while stop < len(runs) and _width(_table(found, runs, start, stop + 1), console) <= console.width:
            stop += 1
        console.print(_table(found, runs, start, stop))
        start = stop
    for run, verdict in zip(runs, judged, strict=True):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for finding in verdict.findings:
            text = Text.assemble((prefix, "dim"), (plain(finding.title), "bold"))
            text.append(f": {plain(finding.evidence)} {plain(finding.advice)}")
            console.print(text, soft_wrap=True, highlight=False)
        if not verdict.findings:
            console.print(Text(f"{prefix}nothing stands out."), soft_wrap=True, highlight=False)
        if verdict.bound == NOTHING:
            console.print(Text(f"{prefix}{plain(verdict.text)}", "dim"), soft_wrap=True, highlight=False)


def _width(table: Table, console: Console) -> int:
    return measure_renderables(console, console.options.update(max_width=10_000), [table]).maximum


def _table(found: Sequence[Fact], runs: Sequence[Style], start: int, stop: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for run in runs[start:stop]:
        table.add_column(Text(shortened(run.name, 40), style=run.colour), justify="right", overflow="fold")
    for fact in found:
        cells = [Text(shortened(cell, 40)) for cell in fact.cells[start:stop]]
        table.add_row(Text(fact.label), *cells)
    return table
