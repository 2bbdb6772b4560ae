"""Summarize runs in a table with one column per run, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table
from rich.text import Text

from ..._console import Screen
from ..analysis.formatting import (
    MISSING,
    format_count,
    format_list,
    format_number,
    format_percent,
    printable,
    shorten,
)
from ..analysis.log import Log, once_per_log
from ..analysis.statistics import finite_median
from .findings import Assessment, assess
from .palette import Style, assign_styles

__all__ = ["SummaryRow", "make_summary", "print_summary"]

KNOWN = {"distclip", "format", "time", "policy", "per", "slots", "tensors", "every"}
"""Keys of a header that have no row, or a special one."""


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One property of all runs.

    Args:
        label: label of the property.
        cells: one text per run.
        text: whether the cells are words instead of numbers.
    """

    label: str
    cells: tuple[str, ...]
    text: bool = False


def make_summary(logs: Sequence[Log], assessments: Sequence[Assessment]) -> list[SummaryRow]:
    """Return the rows for which at least one run has a value."""
    rows = [SummaryRow("outcome", tuple(assessment.outcome.verdict for assessment in assessments), True)]
    rows += [SummaryRow("policy", tuple(_header_value(log, "policy") for log in logs), True)]
    rows += [
        SummaryRow(printable(key).replace("_", " "), tuple(_header_value(log, key) for log in logs), True)
        for key in dict.fromkeys(key for log in logs for key in log.header if key not in KNOWN)
    ]
    rows += [SummaryRow(label, tuple(cell(log) for log in logs)) for label, cell in CELLS.items()]
    rows.append(SummaryRow("suggested bound (p75 … p95)", tuple(assessment.bound for assessment in assessments)))
    return [row for row in rows if any(cell != MISSING for cell in row.cells)]


def print_summary(logs: Sequence[Log], console: Console, assessments: Sequence[Assessment] | None = None) -> None:
    """Print the table and the findings of the runs.

    Args:
        logs: logs of the runs, at least one.
        console: console to print to. Its width is 120 characters if it is not a terminal.
        assessments: see `write_page`.
    """
    console = Screen(console).console
    styles, assessments = assign_styles([log.name for log in logs]), assessments or assess(logs)
    rows = make_summary(logs, assessments)
    # As many columns are printed side by side as fit on the console.
    start = 0
    while start < len(styles):
        stop = start + 1
        while stop < len(styles) and _width(_make_table(rows, styles, start, stop + 1), console) <= console.width:
            stop += 1
        console.print(_make_table(rows, styles, start, stop))
        start = stop
    for log, style, assessment in zip(logs, styles, assessments, strict=True):
        prefix = f"{style.name}: " if len(styles) > 1 else ""
        for finding in assessment.findings:
            text = Text.assemble((prefix, "dim"), (printable(finding.title), "bold"))
            text.append(f": {printable(finding.evidence)} {printable(finding.advice)}")
            console.print(text, soft_wrap=True, highlight=False)
        if not assessment.findings:
            console.print(Text(f"{prefix}no findings."), soft_wrap=True, highlight=False)
        for sentence in log.unknown:
            console.print(Text(f"{prefix}{printable(sentence)}", "dim"), soft_wrap=True, highlight=False)
        if assessment.bound == MISSING:
            console.print(Text(f"{prefix}{printable(assessment.text)}", "dim"), soft_wrap=True, highlight=False)


def _width(table: Table, console: Console) -> int:
    return measure_renderables(console, console.options.update(max_width=10_000), [table]).maximum


def _make_table(rows: Sequence[SummaryRow], styles: Sequence[Style], start: int, stop: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for style in styles[start:stop]:
        table.add_column(Text(shorten(style.name, 40), style=style.colour), justify="right", overflow="fold")
    for row in rows:
        table.add_row(Text(row.label), *(Text(shorten(cell, 40)) for cell in row.cells[start:stop]))
    return table


def _header_value(log: Log, key: str) -> str:
    value = log.header.get(key)
    if isinstance(value, (list, tuple)):
        return format_list(value, 4) or MISSING
    return MISSING if value is None else printable(value)


def _norm_percentile(level: float) -> Callable[[Log], str]:
    def cell(log: Log) -> str:
        percentiles = _norm_percentiles(log)
        return format_number(percentiles[level]) if percentiles else MISSING

    return cell


@once_per_log
def _norm_percentiles(log: Log) -> dict[float, float]:
    """Return the percentiles of the table by level, or nothing without a finite norm."""
    finite = log.norms[np.isfinite(log.norms)]
    if not len(finite):
        return {}
    levels = (50.0, 90.0, 99.0, 100.0)
    return dict(zip(levels, np.percentile(finite, levels).tolist(), strict=True))


def _bound(log: Log) -> str:
    finite = log.bounds[np.isfinite(log.bounds)]
    if not len(finite):
        return MISSING
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        return format_number(low)
    return f"{format_number(low)} … {format_number(high)}, median {format_number(finite_median(finite))}"


def _clip_rate(log: Log) -> str:
    return format_percent(log.clip_rate)


def _mean_coef(log: Log) -> str:
    finite = log.coefs[np.isfinite(log.coefs) & log.finite]
    return format_number(float(finite.mean())) if len(finite) and not log.unknown else MISSING


def _last_loss(log: Log) -> str:
    loss = log.columns.get("loss", np.zeros(0))
    indices = np.flatnonzero(np.isfinite(loss))
    if not len(indices):
        return MISSING
    last = int(indices[-1])
    # The end of the losses, if it is early, is as informative as the last value.
    step = f" (step {format_count(log.steps[last])})" if last < 0.9 * (len(loss) - 1) else ""
    return format_number(float(loss[last])) + step


def _lowest_loss(log: Log) -> str:
    loss = log.columns.get("loss", np.zeros(0))
    return format_number(float(np.nanmin(loss))) if np.isfinite(loss).any() else MISSING


def _summary_value(key: str) -> Callable[[Log], str]:
    def cell(log: Log) -> str:
        summary: Mapping[str, Any] = log.summary or {}
        value = summary.get(key)
        if value is None:
            # The launcher writes null for a held-out loss that is NaN.
            return "not finite" if key == "held_out" and key in summary else MISSING
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return format_number(float(value)) if is_number else printable(value)

    return cell


def _count(count: int, total: int) -> str:
    return f"{format_count(count)} ({format_percent(count / total)})" if count and total else format_count(count)


CELLS: dict[str, Callable[[Log], str]] = {
    "steps": lambda log: format_count(len(log.steps)),
    "norm, median": _norm_percentile(50),
    "norm, p90": _norm_percentile(90),
    "norm, p99": _norm_percentile(99),
    "norm, max": _norm_percentile(100),
    "bound": _bound,
    "clip rate": _clip_rate,
    "mean coefficient": _mean_coef,
    "skipped": lambda log: MISSING if log.unknown else _count(int(log.skipped.sum()), len(log.steps)),
    "not finite": lambda log: _count(int((~log.finite).sum()), len(log.steps)),
    "loss, last": _last_loss,
    "loss, lowest": _lowest_loss,
    "held-out loss": _summary_value("held_out"),
    "loss of a blind guess": _summary_value("guess"),
    "held-out R²": _summary_value("r2"),
    "unreadable lines": lambda log: format_count(log.unreadable) if log.unreadable else MISSING,
}
"""Functions that return the cell of a run, by label."""
