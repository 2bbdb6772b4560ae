"""Prepare the curves over the steps for the page and the PNGs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.formatting import format_list, pluralize, printable
from ..analysis.log import Log
from ..analysis.statistics import Numbers
from .downsample import Indices, bucket_medians, bucket_peaks, downsample, sample_evenly
from .palette import MARKS
from .x_axes import token_counts

__all__ = ["Curve", "Markers", "Panel", "make_panels"]

MAX_POINTS = 30_000
"""Maximum number of buckets of all curves of a page together. They take less than a megabyte."""

MAX_BUCKETS = 2000
"""Maximum number of buckets of one curve."""

TREND_BUCKETS = 400
"""Number of medians along a curve that is too long to be drawn whole."""

MAX_MARKERS = 400
"""Maximum number of markers per kind and run."""

MAX_COLUMNS = 12
"""Maximum number of panels for other columns."""


@dataclass(frozen=True)
class Curve:
    """Values of a run over its steps.

    Args:
        run: index of the run; -1 for a curve that all runs share.
        steps: (n,).
        values: (n,); NaN for a gap.
        trend: medians along the curve, if only its extremes are drawn; None for a complete curve.
    """

    run: int
    steps: NDArray[np.signedinteger[Any]]
    values: NDArray[np.floating[Any]]
    trend: Curve | None = None


@dataclass(frozen=True)
class Markers:
    """Steps of a run at which an event occurred.

    Args:
        run: index of the run.
        kind: kind of the event, a key of `palette.MARKS`.
        steps: (n,).
        heights: (n,) vertical positions.
        texts: (n,) descriptions.
    """

    run: int
    kind: str
    steps: NDArray[np.signedinteger[Any]]
    heights: NDArray[np.floating[Any]]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One of several charts that share the axis of the steps.

    Args:
        key: unique name.
        title: title of the vertical axis, with the unit.
        curves: one per run that has values.
        bounds: norms that the policy allowed, drawn dashed.
        markers: markers on the curves.
        log: whether the vertical axis is logarithmic.
        height: height in pixels.
    """

    key: str
    title: str
    curves: tuple[Curve, ...]
    bounds: tuple[Curve, ...] = ()
    markers: tuple[Markers, ...] = ()
    log: bool = False
    height: int = 110

    @property
    def coef_limit(self) -> float:
        """Upper end of the axis of a panel of coefficients: just above 1, or above the largest one."""
        return 1.06 * max(1.0, *(float(np.nanmax(curve.values, initial=0.0)) for curve in self.curves))


def make_panels(logs: Sequence[Log]) -> tuple[list[Panel], list[str]]:
    """Prepare the panels that have values, and notes about the others."""
    # The index of a tensor is not a quantity.
    no_curves = {"loss", "time", "update_slot"} | token_counts(logs)
    names = list(dict.fromkeys(name for log in logs for name in log.columns if name not in no_curves))
    with_values = [name for name in names if any(np.isfinite(_column(log, name)).any() for log in logs)]
    buckets = max(100, min(MAX_BUCKETS, MAX_POINTS // (len(logs) * (4 + min(len(with_values), MAX_COLUMNS)))))
    panels, notes = [_norm_panel(logs, buckets)], _norm_notes(logs)
    if any(log.clipped.any() for log in logs):
        panels.append(_column_panel("coef", "coefficient", [log.coefs for log in logs], logs, buckets, height=120))
        panels.append(_clip_rate_panel(logs, buckets))
    elif not all(log.unknown for log in logs):
        notes.append("No step was clipped.")
    notes += [f"{_prefix(log, logs)}{sentence}" for log in logs for sentence in log.unknown]
    losses = [_column(log, "loss") for log in logs]
    if any(np.isfinite(loss).any() for loss in losses):
        panels.append(_column_panel("loss", "loss", losses, logs, buckets, height=210))
    without = [log.name for log, loss in zip(logs, losses, strict=True) if not np.isfinite(loss).any()]
    if without:
        notes.append(f"No loss was recorded{_in_runs(without, logs)}.")
    panels += [
        _column_panel(name, printable(name), [_column(log, name) for log in logs], logs, buckets)
        for name in with_values[:MAX_COLUMNS]
    ]
    if any(curve.trend is not None for panel in panels for curve in panel.curves):
        notes.append("Long curves show the minimum and the maximum of each interval in a pale colour, and its median.")
    if with_values[MAX_COLUMNS:]:
        notes.append(f"Columns that are not drawn: {format_list(with_values[MAX_COLUMNS:], 20)}.")
    if without_values := [name for name in names if name not in with_values]:
        notes.append(f"Columns without a finite number: {format_list(without_values, 20)}.")
    return panels, notes


def _prefix(log: Log, logs: Sequence[Log]) -> str:
    return f"{printable(log.name)}: " if len(logs) > 1 else ""


def _column(log: Log, name: str) -> Numbers:
    return log.columns.get(name, np.full(len(log.steps), np.nan))


def _in_runs(names: Sequence[str], logs: Sequence[Log]) -> str:
    return "" if len(names) == len(logs) else f" in {format_list(names)}"


def _norm_notes(logs: Sequence[Log]) -> list[str]:
    """Describe values that a logarithmic axis cannot show."""
    notes = []
    if without := [log.name for log in logs if not np.isfinite(log.norms).any()]:
        notes.append(f"No norm was finite{_in_runs(without, logs)}.")
    if without := [log.name for log in logs if not np.isfinite(log.bounds).any()]:
        notes.append(f"No bound was recorded{_in_runs(without, logs)}.")
    if num_zeros := sum(int((log.norms == 0).sum()) for log in logs):
        verb = "have" if num_zeros > 1 else "has"
        notes.append(f"{pluralize(num_zeros, 'step')} {verb} a norm of 0, which a logarithmic axis cannot show.")
    return notes


def _norm_panel(logs: Sequence[Log], buckets: int) -> Panel:
    curves, bounds, markers = [], [], []
    positive = np.concatenate([column[column > 0] for log in logs for column in (log.norms, log.bounds)])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 1.0)
    # Steps without a norm are marked above all curves, at a separate height for each run.
    spacing = 10 ** (0.05 * max(math.log10(high) - math.log10(low), 1.0))
    shared = len(logs) > 1 and len({_constant_bound(log) for log in logs}) == 1 and _constant_bound(logs[0]) is not None
    many = len(logs) > 8
    for run, log in enumerate(logs):
        spikes = np.searchsorted(log.steps, [spike.step for spike in log.spikes][:MAX_MARKERS])
        keep = sample_evenly(np.flatnonzero(log.skipped), MAX_MARKERS).tolist()
        keep += spikes[spikes < len(log.steps)].tolist()
        curves.append(_curve(run, log, log.norms, downsample(log.norms, buckets, keep)))
        if np.isfinite(log.bounds).any() and not (shared and run):
            bounds.append(_curve(-1 if shared else run, log, log.bounds, _bound_indices(log, buckets)))
        markers += _markers(run, log, min(high * spacing ** (1 if many else 1 + run), 1e300), many)
    # A logarithmic axis cannot show norms that are all 0.
    logarithmic = len(positive) > 0 or bool(markers)
    return Panel("norm", "norm before clipping", tuple(curves), tuple(bounds), tuple(markers), logarithmic, 330)


def _markers(run: int, log: Log, height: float, many: bool) -> list[Markers]:
    """Mark the events of a run. With many runs, clipped steps are not marked."""
    markers = []
    clipped, counts = bucket_peaks(log.norms, log.clipped, MAX_MARKERS)
    if len(clipped) and not many:
        texts = tuple("clipped" if count == 1 else f"{count:,} clipped steps around here" for count in counts)
        markers.append(Markers(run, "clipped", *_points(log, log.norms, clipped), texts))
    for kind, occurred in (("skipped", log.skipped), ("nonfinite", ~log.finite)):
        if len(indices := sample_evenly(np.flatnonzero(occurred), MAX_MARKERS)):
            heights = np.where(np.isfinite(log.norms), log.norms, height)
            text = f"{MARKS[kind].label} ({pluralize(int(occurred.sum()), 'step')} in total)"
            markers.append(Markers(run, kind, *_points(log, heights, indices), (text,) * len(indices)))
    return markers


def _constant_bound(log: Log) -> float | None:
    """Return the bound if it never changes."""
    finite = log.bounds[np.isfinite(log.bounds)]
    return float(finite[0]) if len(finite) and finite.min() == finite.max() else None


def _bound_indices(log: Log, buckets: int) -> Indices:
    if _constant_bound(log) is None:
        return downsample(log.bounds, buckets)
    finite = np.flatnonzero(np.isfinite(log.bounds))
    return np.unique(finite[[0, -1]])


def _clip_rate_panel(logs: Sequence[Log], buckets: int) -> Panel:
    longest = max(len(log.steps) for log in logs)
    window = min(1000, max(1, longest // 20, min(50, longest // 4)))
    rates = [rolling_rate(log.clipped, window) for log in logs]
    title = f"clip rate, %<br>({window:,} steps)"
    return _column_panel("clip_rate", title, rates, logs, buckets, height=120)


def rolling_rate(flags: NDArray[np.bool_], window: int) -> Numbers:
    """Return the percentage of true flags in the last `window` steps.

    The first values are NaN, because there are not enough steps yet.
    """
    rates = np.full(len(flags), np.nan)
    window = min(window, len(flags))
    if window:
        sums = np.concatenate([[0], np.cumsum(flags)])
        rates[window - 1 :] = 100 * (sums[window:] - sums[:-window]) / window
    return rates


def _column_panel(
    key: str, title: str, columns: Sequence[Numbers], logs: Sequence[Log], buckets: int, height: int = 110
) -> Panel:
    """Prepare a panel with a curve per run.

    The axis is logarithmic for positive values that span more than a factor of 20.
    """
    finite = np.concatenate([values[np.isfinite(values)] for values in columns])
    log_axis = key not in ("coef", "clip_rate") and bool(finite.min() > 0 and finite.max() > 20 * finite.min())
    curves = [
        _curve(run, log, values, downsample(values, buckets))
        for run, (log, values) in enumerate(zip(logs, columns, strict=True))
        if np.isfinite(values).any()
    ]
    return Panel(key, title, tuple(curves), log=log_axis, height=height)


def _curve(run: int, log: Log, values: Numbers, indices: Indices) -> Curve:
    if len(indices) == len(values):
        return Curve(run, *_points(log, values, indices))
    middles, medians = bucket_medians(values, TREND_BUCKETS)
    return Curve(run, *_points(log, values, indices), Curve(run, *_compact(log.steps[middles], medians)))


def _points(
    log: Log, values: Numbers, indices: Indices
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.floating[Any]]]:
    return _compact(log.steps[indices], values[indices])


def _compact(
    steps: NDArray[np.int64], values: Numbers
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.floating[Any]]]:
    """Convert to 32 bits if the numbers fit, which halves the size of the page."""
    magnitudes = np.abs(values[np.isfinite(values) & (values != 0)])
    fits = not magnitudes.size or (magnitudes.max() < 1e38 and magnitudes.min() > 1e-37)
    return (
        steps.astype(np.int32) if not steps.size or steps[-1] < 2**31 else steps,
        values.astype(np.float32) if fits else values,
    )
