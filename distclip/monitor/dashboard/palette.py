"""Define colours and shapes. A run has the same colour on every chart, and each kind of event has a separate shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.formatting import printable

__all__ = ["GREY", "MARKS", "QUANTILES", "RUN_COLOURS", "Mark", "Style", "assign_styles"]

RUN_COLOURS = ["#0077bb", "#d9652a", "#009988", "#bb4488", "#7a7fe0", "#999933", "#cc6677", "#7f7f8c"]
"""Colours of runs, similar to Paul Tol's. Their contrast to both backgrounds of the page is above 3."""

GREY = "#8a8f98"
"""Colour of elements that belong to no single run."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Look of the marks of one kind of event.

    Args:
        label: label of the event.
        symbol: name of the shape in plotly.
        colour: colour on a chart of one run. On a chart of several runs, the mark has the colour of its run.
        size: size in pixels.
    """

    label: str
    symbol: str
    colour: str
    size: int


MARKS = {
    "clipped": Mark("clipped", "triangle-down", "#c4761a", 6),
    "skipped": Mark("skipped", "square-open", "#bb4488", 11),
    "nonfinite": Mark("not finite", "x-thin", "#cc3311", 8),
}
"""Marks by kind of event."""

QUANTILES = {75: "circle", 90: "diamond", 95: "square"}
"""Percentiles that are marked on a distribution, with the shape in plotly."""


@dataclass(frozen=True, slots=True)
class Style:
    """Look of a run.

    Args:
        name: name of the run.
        group: name in a legend of all runs that share the colour.
        colour: colour as #rrggbb.
        dashed: whether the lines are dashed, because there are more groups than colours.
        first: whether the run represents its group in a legend.
    """

    name: str
    group: str
    colour: str
    dashed: bool
    first: bool


def assign_styles(names: Sequence[str]) -> list[Style]:
    """Assign a style to each run.

    If there are many runs, those that differ only in a number (a seed) share a colour.

    Args:
        names: names of the runs.

    Returns:
        The styles in the order of the names.
    """
    names = [printable(name) for name in names]
    groups = _group_names(names)
    order = list(dict.fromkeys(groups))
    sizes = {group: groups.count(group) for group in order}
    represented: set[str] = set()
    styles = []
    for name, group in zip(names, groups, strict=True):
        i = order.index(group)
        label = (
            f"{group or 'all'} ({sizes[group]} runs)" if sizes[group] > 1 else name if names.count(name) == 1 else group
        )
        colour = RUN_COLOURS[i % len(RUN_COLOURS)]
        styles.append(Style(name, label, colour, (i // len(RUN_COLOURS)) % 2 == 1, group not in represented))
        represented.add(group)
    return styles


def _group_names(names: Sequence[str]) -> list[str]:
    """Return the group of each run.

    The numbers that vary most are removed from the names until there are enough colours.
    """
    parts = [re.split(r"[/,]", name) for name in names]
    if len(set(names)) <= len(RUN_COLOURS) or len({len(part) for part in parts}) > 1:
        # Two runs with the same name are still two runs.
        return [name if names.count(name) == 1 else f"{name} #{i + 1}" for i, name in enumerate(names)]
    columns = [list(column) for column in zip(*parts, strict=True)]
    numeric = [i for i, column in enumerate(columns) if len({re.sub(r"\d+", "", part) for part in column}) == 1]
    for i in sorted(numeric, key=lambda i: len(set(columns[i])), reverse=True):
        columns[i] = [""] * len(names)
        if len(set(zip(*columns, strict=True))) <= len(RUN_COLOURS):
            break
    return ["/".join(part for part in row if part) for row in zip(*columns, strict=True)]
