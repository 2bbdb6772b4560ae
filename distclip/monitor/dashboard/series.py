"""What is drawn over the steps, for a page and for pictures alike: decided and thinned once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.log import Log, Numbers
from .palette import MARKS
from .thinning import Indices, crests, sample, thin, trend
from .words import listed, plain

__all__ = ["Line", "Marked", "Panel", "panels"]

POINTS = 30_000
"""Buckets of all curves of a page together; less than a megabyte."""

BUCKETS = 2000
"""Of one curve, at most."""

TREND = 400
"""Medians along a curve that is too long for its points."""

MARKED = 400
"""Marks of a kind and run, at most."""

COLUMNS = 12
"""Curves of further columns, at most."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        run: which.
        steps: (n,).
        values: (n,); NaN leaves a gap.
        trend: medians along it, where only its extremes are drawn; None where all of it is.
    """

    run: int
    steps: NDArray[np.signedinteger[Any]]
    values: NDArray[np.floating[Any]]
    trend: Line | None = None


@dataclass(frozen=True)
class Marked:
    """Steps of a run at which something happened.

    Args:
        run: which.
        kind: key of `palette.MARKS`.
        steps, heights: (n,) where the marks are.
        texts: a word on each.
    """

    run: int
    kind: str
    steps: NDArray[np.signedinteger[Any]]
    heights: NDArray[np.floating[Any]]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One of the charts that lie above each other and share their steps.

    Args:
        key: to find it by.
        title: of its axis, with the unit.
        lines: a curve of each run that has one.
        bounds: what the policy allowed, dashed.
        marks: on the curves.
        log: whether its axis is logarithmic.
        tall: in pixels.
    """

    key: str
    title: str
    lines: tuple[Line, ...]
    bounds: tuple[Line, ...] = ()
    marks: tuple[Marked, ...] = ()
    log: bool = False
    tall: int = 110


def panels(logs: Sequence[Log]) -> tuple[list[Panel], list[str]]:
    """The panels that there is something for, and a sentence on each of which there is nothing."""
    names = list(dict.fromkeys(name for log in logs for name in log.columns if name not in ("loss", "time")))
    alive = [name for name in names if any(np.isfinite(_column(log, name)).any() for log in logs)]
    buckets = max(100, min(BUCKETS, POINTS // (len(logs) * (4 + min(len(alive), COLUMNS)))))
    found, notes = [_norms(logs, buckets)], _on_norms(logs)
    if any(log.clipped.any() for log in logs):
        found.append(_columns("coef", "coefficient", [log.coefs for log in logs], logs, buckets, tall=120))
        found.append(_clip_rate(logs, buckets))
    else:
        notes.append("No step was clipped.")
    losses = [_column(log, "loss") for log in logs]
    if any(np.isfinite(loss).any() for loss in losses):
        found.append(_columns("loss", "loss", losses, logs, buckets, tall=210))
    without = [log.name for log, loss in zip(logs, losses, strict=True) if not np.isfinite(loss).any()]
    if without:
        notes.append(f"No loss was recorded{_of(without, logs)}.")
    found += [
        _columns(name, plain(name), [_column(log, name) for log in logs], logs, buckets) for name in alive[:COLUMNS]
    ]
    if any(line.trend is not None for panel in found for line in panel.lines):
        notes.append("Of so many steps a curve shows the extremes of each stretch, pale, and its median.")
    if alive[COLUMNS:]:
        notes.append(f"Columns that are not drawn: {listed(alive[COLUMNS:], 20)}.")
    if dead := [name for name in names if name not in alive]:
        notes.append(f"Columns without a finite number: {listed(dead, 20)}.")
    return found, notes


def _column(log: Log, name: str) -> Numbers:
    return log.columns.get(name, np.full(len(log.steps), np.nan))


def _of(names: Sequence[str], logs: Sequence[Log]) -> str:
    return "" if len(names) == len(logs) else f" in {listed(names, 5)}"


def _on_norms(logs: Sequence[Log]) -> list[str]:
    """What a logarithmic axis does not show."""
    notes = []
    if never := [log.name for log in logs if not np.isfinite(log.norms).any()]:
        notes.append(f"No norm was finite{_of(never, logs)}.")
    if unbound := [log.name for log in logs if not np.isfinite(log.bounds).any()]:
        notes.append(f"No bound was recorded{_of(unbound, logs)}.")
    if zeros := sum(int((log.norms == 0).sum()) for log in logs):
        notes.append(f"{zeros:,} {'steps have' if zeros > 1 else 'step has'} a norm of 0, below every log axis.")
    return notes


def _norms(logs: Sequence[Log], buckets: int) -> Panel:
    lines, bounds, marks = [], [], []
    positive = np.concatenate([each[each > 0] for log in logs for each in (log.norms, log.bounds)])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 1.0)
    # Beyond all curves there is a line for each run's marks of steps that have no norm.
    shelf = 10 ** (0.05 * max(math.log10(high) - math.log10(low), 1.0))
    shared = len(logs) > 1 and len({_constant(log) for log in logs}) == 1 and _constant(logs[0]) is not None
    many = len(logs) > 8
    for run, log in enumerate(logs):
        spikes = np.searchsorted(log.steps, [spike.step for spike in log.spikes][:MARKED])
        keep = sample(np.flatnonzero(log.skipped), MARKED).tolist() + spikes[spikes < len(log.steps)].tolist()
        lines.append(_line(run, log, log.norms, thin(log.norms, buckets, keep)))
        if np.isfinite(log.bounds).any() and not (shared and run):
            bounds.append(_line(-1 if shared else run, log, log.bounds, _bound(log, buckets)))
        marks += _marks(run, log, min(high * shelf ** (1 if many else 1 + run), 1e300), many)
    # Norms that are all 0 have no place on a logarithmic axis.
    logarithmic = len(positive) > 0 or bool(marks)
    return Panel("norm", "gradient norm, unclipped", tuple(lines), tuple(bounds), tuple(marks), logarithmic, 330)


def _marks(run: int, log: Log, shelf: float, many: bool) -> list[Marked]:
    """Those of a run; where there are many runs, no clipped steps, which their curves show."""
    found = []
    clipped, counts = crests(log.norms, log.clipped, MARKED)
    if len(clipped) and not many:
        texts = tuple("clipped" if count == 1 else f"{count:,} steps clipped hereabouts" for count in counts)
        found.append(Marked(run, "clipped", *_drawn(log, log.norms, clipped), texts))
    for kind, happened in (("skipped", log.skipped), ("nonfinite", ~log.finite)):
        if len(places := sample(np.flatnonzero(happened), MARKED)):
            heights = np.where(np.isfinite(log.norms), log.norms, shelf)
            total = int(happened.sum())
            text = f"{MARKS[kind].label} ({total:,} such step{'s' * (total > 1)})"
            found.append(Marked(run, kind, *_drawn(log, heights, places), (text,) * len(places)))
    return found


def _constant(log: Log) -> float | None:
    """A bound that is always the same."""
    finite = log.bounds[np.isfinite(log.bounds)]
    return float(finite[0]) if len(finite) and finite.min() == finite.max() else None


def _bound(log: Log, buckets: int) -> Indices:
    if _constant(log) is None:
        return thin(log.bounds, buckets)
    known = np.flatnonzero(np.isfinite(log.bounds))
    return np.unique(known[[0, -1]])


def _clip_rate(logs: Sequence[Log], buckets: int) -> Panel:
    longest = max(len(log.steps) for log in logs)
    window = min(1000, max(1, longest // 20, min(50, longest // 4)))
    rates = [rolling(log.clipped, window) for log in logs]
    title = f"clipped, %<br>of {window:,} steps"
    return _columns("clip_rate", title, rates, logs, buckets, tall=120)


def rolling(happened: NDArray[np.bool_], window: int) -> Numbers:
    """In how many of the last steps, in %; NaN before there are enough of them."""
    rates = np.full(len(happened), np.nan)
    window = min(window, len(happened))
    if window:
        sums = np.concatenate([[0], np.cumsum(happened)])
        rates[window - 1 :] = 100 * (sums[window:] - sums[:-window]) / window
    return rates


def _columns(
    key: str, title: str, each: Sequence[Numbers], logs: Sequence[Log], buckets: int, tall: int = 110
) -> Panel:
    """A curve of every run, on a logarithmic axis if they are positive and span a lot."""
    finite = np.concatenate([values[np.isfinite(values)] for values in each])
    log_axis = key not in ("coef", "clip_rate") and bool(finite.min() > 0 and finite.max() > 20 * finite.min())
    lines = [
        _line(run, log, values, thin(values, buckets))
        for run, (log, values) in enumerate(zip(logs, each, strict=True))
        if np.isfinite(values).any()
    ]
    return Panel(key, title, tuple(lines), log=log_axis, tall=tall)


def _line(run: int, log: Log, values: Numbers, places: Indices) -> Line:
    if len(places) == len(values):
        return Line(run, *_drawn(log, values, places))
    middles, medians = trend(values, TREND)
    return Line(run, *_drawn(log, values, places), Line(run, *_small(log.steps[middles], medians)))


def _drawn(
    log: Log, values: Numbers, places: Indices
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.floating[Any]]]:
    return _small(log.steps[places], values[places])


def _small(
    steps: NDArray[np.int64], drawn: Numbers
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.floating[Any]]]:
    """In half the size, unless it would not fit."""
    size = np.abs(drawn[np.isfinite(drawn) & (drawn != 0)])
    fits = not size.size or (size.max() < 1e38 and size.min() > 1e-37)
    return (
        steps.astype(np.int32) if not steps.size or steps[-1] < 2**31 else steps,
        drawn.astype(np.float32) if fits else drawn,
    )
