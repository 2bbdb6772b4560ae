"""The closing table: a column per run, and a line for whatever one of them has a figure of."""

from collections.abc import Iterator, Mapping
from math import ceil, isfinite, isnan

from rich.console import Console
from rich.table import Table

from record import Outcome


def tables(outcomes: Mapping[str, Outcome], console: Console) -> Iterator[Table]:
    """All columns side by side if the console is wide enough, or else as few tables as hold them, equally wide."""
    names, unbounded = list(outcomes), console.options.update(width=10**6)
    for rows in range(1, len(names) + 1):
        most = ceil(len(names) / rows)
        made = [table(outcomes, names[i : i + most]) for i in range(0, len(names), most)]
        if most == 1 or all(console.measure(each, options=unbounded).maximum <= console.width for each in made):
            break
    yield from made


def table(outcomes: Mapping[str, Outcome], names: list[str]) -> Table:
    made = Table(show_header=len(outcomes) > 1)
    made.add_column(no_wrap=True)
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for title, cells in lines(list(outcomes.values())):
        made.add_row(
            title, *(cells[list(outcomes).index(name)] for name in names), style="bold" if title == LOSS else ""
        )
    return made


LOSS = "held-out loss"


def lines(runs: list[Outcome]) -> Iterator[tuple[str, list[str]]]:
    """Title and a cell for each run; only what one of them has."""
    yield "steps", [str(run.steps) for run in runs]
    yield LOSS, [number(run.held_out) for run in runs]
    if any(not isnan(run.guess) for run in runs):
        yield "  of a blind guess", [number(run.guess) for run in runs]
    if any(run.r2 is not None for run in runs):
        yield "held-out R2", ["" if run.r2 is None else f"{run.r2:.4g}" for run in runs]
    for title in dict.fromkeys(each.title for run in runs for each in run.measures):
        yield title, [measured(run, title) for run in runs]
    for level in runs[0].norms:
        yield f"norm {level}", [f"{run.norms[level]:.3g}" for run in runs]
    if any(run.nonfinite for run in runs):
        yield "norm not finite", [f"{run.nonfinite} steps" for run in runs]
        yield "  first at step", [str(run.first_nonfinite or "") for run in runs]
    for title, counts in {"skipped": [r.skipped for r in runs], "zeroed": [r.zeroed for r in runs]}.items():
        if any(counts):
            yield title, [f"{count} steps" for count in counts]
    yield "clip rate", [f"{run.clip_rate:.1%}" for run in runs]
    yield "time", [f"{run.seconds:.1f} s" for run in runs]


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def measured(run: Outcome, title: str) -> str:
    each = next((each for each in run.measures if each.title == title), None)
    if each is None:
        return ""
    return each.form.format(each.value) if isfinite(each.value) else "-"


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
