"""Prepare heat maps of the per-tensor norms for the page and the PNGs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.formatting import format_list, printable
from ..analysis.log import Log
from ..analysis.statistics import Numbers

__all__ = ["HeatMap", "make_heat_maps"]

MAX_ROWS = 40
"""Maximum number of tensors per run."""

MAX_CELLS = 36_000
"""Maximum number of cells of all heat maps of a page together."""

MAX_RUNS = 6
"""Maximum number of heat maps."""


@dataclass(frozen=True)
class HeatMap:
    """Norms of a run's tensors.

    Args:
        run: index of the run.
        names: names of its rows, from the top.
        labels: the names without the parts that all names share.
        pattern: the shared parts, with a star for the label.
        steps: (columns,) first step of each column.
        logs: (rows, columns) decimal logarithm of the largest norm in a column's steps; NaN if none was finite.
        limits: (low, high) of the colours, as logarithms; the same for all runs.
        num_hidden: number of tensors without a row: those with the smallest norms.
    """

    run: int
    names: tuple[str, ...]
    labels: tuple[str, ...]
    pattern: str
    steps: NDArray[np.int64]
    logs: NDArray[np.floating[Any]]
    limits: tuple[float, float]
    num_hidden: int


def make_heat_maps(logs: Sequence[Log]) -> tuple[list[HeatMap], list[str]]:
    """Prepare heat maps of the runs with per-tensor norms, and notes about the other runs."""
    with_tensors = [(run, log) for run, log in enumerate(logs) if np.isfinite(log.tensor_peaks).any()]
    if not with_tensors:
        return [], ["No per-tensor norms were recorded."]
    notes = []
    if len(with_tensors) < len(logs):
        runs = {run for run, _ in with_tensors}
        without = [log.name for run, log in enumerate(logs) if run not in runs]
        notes.append(f"No per-tensor norms were recorded in {format_list(without)}.")
    if len(with_tensors) > MAX_RUNS:
        notes.append(f"The first {MAX_RUNS} of {len(with_tensors)} runs are shown.")
    parts = [(run, log, *_largest_rows(log)) for run, log in with_tensors[:MAX_RUNS]]
    num_columns = MAX_CELLS // sum(len(rows) for _, _, rows, _ in parts)
    finite = np.concatenate([norms[np.isfinite(norms)] for *_, norms in parts])
    # The scale begins at the 2nd percentile, because one tensor that is almost zero must not use it up.
    limits = (float(np.percentile(finite, 2)), float(finite.max()))
    heat_maps = []
    for run, log, rows, norms in parts:
        starts = np.unique(np.linspace(0, len(norms), min(len(norms), num_columns), endpoint=False).astype(np.int64))
        highest = np.fmax.reduceat(norms, starts, axis=0).T.astype(np.float32)
        names = tuple(printable(log.tensors[row]) for row in rows)
        labels, pattern = split_common_parts(names)
        num_hidden = len(log.tensors) - len(rows)
        heat_maps.append(HeatMap(run, names, labels, pattern, log.tensor_steps[starts], highest, limits, num_hidden))
    return heat_maps, notes


def _largest_rows(log: Log) -> tuple[list[int], Numbers]:
    """Return the tensors with the largest norms, in the model's order.

    Returns:
        Their indices, and (steps, rows) logarithms of their norms.
    """
    peaks = np.fmax.reduce(np.where(np.isfinite(log.tensor_peaks), log.tensor_peaks, -1.0), axis=0)
    rows = sorted(np.argsort(-peaks, kind="stable")[:MAX_ROWS].tolist())
    norms = log.tensor_peaks[:, rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        return rows, np.where(norms > 0, np.log10(norms), np.nan)


def split_common_parts(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Split names into the parts that differ and the pattern that all names share.

    >>> split_common_parts(["layers.0.mlp.weight", "layers.1.mlp.weight", "layers.1.attention.weight"])
    (('0.mlp', '1.mlp', '1.attention'), 'layers.*.weight')
    """
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts)) - 1
    start = _count_equal(zip(*parts, strict=False), shortest)
    stop = _count_equal(zip(*(reversed(part) for part in parts), strict=False), shortest - start)
    pattern = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - stop :]])
    return tuple(".".join(part[start : len(part) - stop]) for part in parts), pattern


def _count_equal(columns: Iterable[Sequence[str]], limit: int) -> int:
    """Return the number of leading columns whose entries are all equal, at most `limit`."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, islice(columns, limit)))
