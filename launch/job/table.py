"""Build the closing table: a column for each run, and a row for each number that some run has."""

from collections.abc import Iterator, Mapping
from math import ceil, isfinite, isnan

from rich.console import Console
from rich.table import Table

from distclip._console import cell

from .log import Summary

LOSS = "held-out loss"


def build_tables(summaries: Mapping[str, Summary], console: Console) -> list[Table]:
    """Return one table of all runs, or the fewest tables of equal size that fit the console's width."""
    names, unbounded = list(summaries), console.options.update(width=10**6)
    for num_tables in range(1, len(names) + 1):
        num_columns = ceil(len(names) / num_tables)
        chunks = [names[i : i + num_columns] for i in range(0, len(names), num_columns)]
        tables = [_build_table(summaries, chunk) for chunk in chunks]
        if all(console.measure(table, options=unbounded).maximum <= console.width for table in tables):
            break
    return tables


def _build_table(summaries: Mapping[str, Summary], names: list[str]) -> Table:
    """Return the table of some runs. It has the rows of all runs."""
    table = Table(show_header=len(summaries) > 1)
    table.add_column(no_wrap=True)
    for name in names:
        table.add_column(cell(name), justify="right", no_wrap=True)
    for title, cells in build_rows(list(summaries.values())):
        by_name = dict(zip(summaries, cells, strict=True))
        table.add_row(cell(title), *(cell(by_name[name]) for name in names), style="bold" if title == LOSS else "")
    return table


def build_rows(runs: list[Summary]) -> Iterator[tuple[str, list[str]]]:
    """Yield the title of each row with a cell for each run."""
    yield "steps", [str(run.steps) for run in runs]
    yield LOSS, [format_loss(run.held_out) for run in runs]
    if any(not isnan(run.guess) for run in runs):
        yield "  at chance level", [format_loss(run.guess) for run in runs]
    if any(run.r2 is not None for run in runs):
        yield "held-out R2", ["" if run.r2 is None else f"{run.r2:.4g}" for run in runs]
    for title in dict.fromkeys(metric.title for run in runs for metric in run.measures):
        yield title, [_format_metric(run, title) for run in runs]
    for level in runs[0].norms:
        yield f"norm {level}", [f"{run.norms[level]:.3g}" for run in runs]
    if any(run.nonfinite for run in runs):
        yield "non-finite norm", [f"{run.nonfinite} steps" for run in runs]
        yield "  first at step", [str(run.first_nonfinite or "") for run in runs]
    for title, counts in {"skipped": [r.skipped for r in runs], "zeroed": [r.zeroed for r in runs]}.items():
        if any(counts):
            yield title, [f"{count} steps" for count in counts]
    yield "clip rate", [f"{run.clip_rate:.1%}" for run in runs]
    yield "time", [f"{run.seconds:.1f} s" for run in runs]


def format_loss(value: float) -> str:
    """Format a loss with three decimals, or in scientific notation if it is huge."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def _format_metric(run: Summary, title: str) -> str:
    """Format a metric of a run. Empty if the run has no such metric, "-" if its value is not finite."""
    metric = next((metric for metric in run.measures if metric.title == title), None)
    if metric is None:
        return ""
    return metric.form.format(metric.value) if isfinite(metric.value) else "-"


def describe_culprits(run: Summary, limit: int) -> list[str]:
    """Describe the first parameters with non-finite gradients: "0.weight (3 NaN on rank 1) at step 12"."""
    texts = [f"{culprit} at step {incident.step}" for incident in run.incidents for culprit in incident.culprits]
    return texts if len(texts) <= limit else [*texts[:limit], f"and {len(texts) - limit} more"]
