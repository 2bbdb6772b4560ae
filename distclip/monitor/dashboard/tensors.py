"""The norms of the single tensors over the steps, for a page and for pictures alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.log import Log, Numbers
from .words import listed, plain

__all__ = ["HeatMap", "heat_maps"]

ROWS = 40
"""Tensors of a run, at most."""

CELLS = 36_000
"""Of all heat maps of a page together."""

RUNS = 6
"""Heat maps, at most."""


@dataclass(frozen=True)
class HeatMap:
    """Norms of a run's tensors.

    Args:
        run: which.
        names: of its rows, from the top.
        labels: the same without the parts that all have alike, and
        pattern: these, with a star for what is left.
        steps: (columns,) at which each column begins.
        logs: (rows, columns) decimal logarithm of the largest norm of a column's steps; NaN where none was finite.
        limits: of the colours, as logarithms; the same for all runs.
        left_out: how many tensors have no row: the smallest.
    """

    run: int
    names: tuple[str, ...]
    labels: tuple[str, ...]
    pattern: str
    steps: NDArray[np.int64]
    logs: NDArray[np.floating[Any]]
    limits: tuple[float, float]
    left_out: int


def heat_maps(logs: Sequence[Log]) -> tuple[list[HeatMap], list[str]]:
    """Of the runs that recorded tensors, and a sentence on those without."""
    having = [(run, log) for run, log in enumerate(logs) if np.isfinite(log.tensor_norms).any()]
    if not having:
        return [], ["No norms of single tensors were recorded."]
    notes = []
    if len(having) < len(logs):
        without = [log.name for run, log in enumerate(logs) if all(run != other for other, _ in having)]
        notes.append(f"No norms of single tensors in {listed(without, 5)}.")
    if len(having) > RUNS:
        notes.append(f"Norms of single tensors: the first {RUNS} of {len(having)} runs.")
    parts = [(run, log, *_rows(log)) for run, log in having[:RUNS]]
    cells = CELLS // sum(len(rows) for _, _, rows, _ in parts)
    every = np.concatenate([norms[np.isfinite(norms)] for *_, norms in parts])
    # One tensor that is next to zero must not take the colours away from all others.
    limits = (float(np.percentile(every, 2)), float(every.max()))
    found = []
    for run, log, rows, norms in parts:
        starts = np.unique(np.linspace(0, len(norms), min(len(norms), cells), endpoint=False).astype(np.int64))
        highest = np.fmax.reduceat(norms, starts, axis=0).T.astype(np.float32)
        names = tuple(plain(log.tensors[row]) for row in rows)
        left_out = len(log.tensors) - len(rows)
        found.append(HeatMap(run, names, *labels(names), log.tensor_steps[starts], highest, limits, left_out))
    return found, notes


def _rows(log: Log) -> tuple[list[int], Numbers]:
    """Which tensors, in the model's order, and the logarithms of their norms, (steps, rows)."""
    peaks = np.fmax.reduce(np.where(np.isfinite(log.tensor_norms), log.tensor_norms, -1.0), axis=0)
    rows = sorted(np.argsort(-peaks, kind="stable")[:ROWS].tolist())
    norms = log.tensor_norms[:, rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        return rows, np.where(norms > 0, np.log10(norms), np.nan)


def labels(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """What tells the names apart, and where it stands in them.

    >>> labels(["layers.0.mlp.weight", "layers.1.mlp.weight", "layers.1.attention.weight"])
    (('0.mlp', '1.mlp', '1.attention'), 'layers.*.weight')
    """
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts)) - 1
    start = _alike(zip(*parts, strict=False), shortest)
    stop = _alike(zip(*(reversed(each) for each in parts), strict=False), shortest - start)
    pattern = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - stop :]])
    return tuple(".".join(each[start : len(each) - stop]) for each in parts), pattern


def _alike(places: Iterable[Sequence[str]], most: int) -> int:
    """In how many places from the first on all have the same."""
    return sum(1 for _ in takewhile(lambda place: len(set(place)) == 1, islice(places, most)))
