"""What is drawn how: a run has the same colour on every chart, and what happened at a step its own shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .words import plain

__all__ = ["GREY", "MARKS", "QUANTILES", "RUNS", "Mark", "Style", "styles"]

RUNS = ["#0077bb", "#ee7733", "#009988", "#aa3377", "#33a6dd", "#999933", "#cc6677", "#7f7f8c"]
"""Of runs. They can be told apart by the colour-blind (after Paul Tol), and seen on white and on near black."""

GREY = "#8a8f98"
"""Of what belongs to no run."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How to mark a step.

    Args:
        label: what happened there.
        plotly, matplotlib: names of its shape.
        colour: on a chart of one run; among several it has the run's.
        size: in pixels.
        open: only its outline.
    """

    label: str
    plotly: str
    matplotlib: str
    colour: str
    size: int
    open: bool = False


MARKS = {
    "clipped": Mark("clipped", "triangle-down", "v", "#ee9a33", 6),
    "skipped": Mark("skipped", "square-open", "s", "#aa3377", 11, open=True),
    "nonfinite": Mark("not finite", "x-thin", "x", "#cc3311", 8),
}

QUANTILES = {75: ("circle", "o"), 90: ("diamond", "D"), 95: ("square", "s")}
"""Percentiles of the norms that are marked on their distribution: plotly's and matplotlib's shapes."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a run is drawn.

    Args:
        name: its own.
        group: of the runs that share its colour: the name it has in a legend.
        colour: as #rrggbb.
        dashed: among more groups than colours.
        first: of its group, which speaks for it in a legend.
    """

    name: str
    group: str
    colour: str
    dashed: bool
    first: bool


def styles(names: Sequence[str]) -> list[Style]:
    """Of runs, in their order. Those that differ in a number (a seed) share a colour if need be."""
    names = [plain(name) for name in names]
    groups = _groups(names)
    order = list(dict.fromkeys(groups))
    sizes = {group: groups.count(group) for group in order}
    seen: set[str] = set()
    result = []
    for name, group in zip(names, groups, strict=True):
        place = order.index(group)
        label = (
            f"{group or 'all'} ({sizes[group]} runs)" if sizes[group] > 1 else name if names.count(name) == 1 else group
        )
        result.append(Style(name, label, RUNS[place % len(RUNS)], (place // len(RUNS)) % 2 == 1, group not in seen))
        seen.add(group)
    return result


def _groups(names: Sequence[str]) -> list[str]:
    """A key each. The most varied numbers of the names are left out until there are enough colours."""
    parts = [re.split(r"[/,]", name) for name in names]
    if len(set(names)) <= len(RUNS) or len({len(each) for each in parts}) > 1:
        # Two runs of the same name are still two.
        return [name if names.count(name) == 1 else f"{name} #{i + 1}" for i, name in enumerate(names)]
    columns = [list(column) for column in zip(*parts, strict=True)]
    numbers = [i for i, column in enumerate(columns) if len({re.sub(r"\d+", "", part) for part in column}) == 1]
    for i in sorted(numbers, key=lambda i: len(set(columns[i])), reverse=True):
        columns[i] = [""] * len(names)
        if len(set(zip(*columns, strict=True))) <= len(RUNS):
            break
    return ["/".join(part for part in row if part) for row in zip(*columns, strict=True)]
