"""Prepare alternatives to steps as the horizontal axis of the curves: tokens and time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.log import Log
from ..analysis.statistics import Numbers

__all__ = ["XAxis", "make_x_axes", "token_counts"]

TOKENS = re.compile(r"(.*[/_.])?tokens(_seen)?")
"""Pattern of the names of a column of tokens, such as that of transformers (`num_input_tokens_seen`)."""

MAX_KNOTS = 4000
"""Maximum number of points of an axis, for all runs together. The page interpolates between them."""

TIMES = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
"""Shortest duration in seconds for which a unit is used, and the seconds and the name of the unit."""


@dataclass(frozen=True)
class XAxis:
    """Positions of the steps of all runs on another axis.

    Args:
        title: title of the axis, with the unit.
        steps: (knots,) steps per run.
        positions: (knots,) positions of these steps per run.
    """

    title: str
    steps: tuple[NDArray[np.int64], ...]
    positions: tuple[Numbers, ...]


def make_x_axes(logs: Sequence[Log]) -> list[XAxis]:
    """Return the axes for which every run has positions."""
    axes = []
    if all(known := [_tokens(log) for log in logs]):
        axes.append(_make_axis("tokens", [pair for pair in known if pair is not None], 1))
    if all(times := [_seconds(log) for log in logs]):
        pairs = [pair for pair in times if pair is not None]
        duration = max(float(seconds[-1]) for _, seconds in pairs)
        divisor, unit = next((divisor, unit) for least, divisor, unit in TIMES if duration >= least)
        axes.append(_make_axis(f"{unit} since the first step", pairs, divisor))
    return axes


def token_counts(logs: Sequence[Log]) -> frozenset[str]:
    """Return the columns with the tokens since the start, which are an axis and need no curve."""
    if not all(_tokens(log) for log in logs):
        return frozenset()
    names = [(log, name) for log in logs for name in (_token_column(log),) if name is not None]
    return frozenset(name for log, name in names if (known := _known(log, name)) and _rises(known[1]))


def _make_axis(title: str, pairs: Sequence[tuple[Any, Any]], divisor: float) -> XAxis:
    steps, positions = [], []
    for known_steps, known in pairs:
        size = min(len(known), max(2, MAX_KNOTS // len(pairs)))
        chosen = np.linspace(0, len(known) - 1, size).round().astype(np.int64)
        steps.append(known_steps[chosen])
        positions.append(known[chosen] / divisor)
    return XAxis(title, tuple(steps), tuple(positions))


def _tokens(log: Log) -> tuple[NDArray[np.int64], Numbers] | None:
    name = _token_column(log)
    if name is None or (known := _known(log, name)) is None:
        return None
    steps, tokens = known
    # If a column does not rise at every step, it has the tokens of single steps.
    return steps, tokens if _rises(tokens) else np.cumsum(tokens)


def _token_column(log: Log) -> str | None:
    return next((name for name in log.columns if TOKENS.fullmatch(name)), None)


def _rises(values: Numbers) -> bool:
    return bool((np.diff(values) > 0).all())


def _seconds(log: Log) -> tuple[NDArray[np.int64], Numbers] | None:
    known = _known(log, "time")
    return None if known is None else (known[0], known[1] - known[1][0])


def _known(log: Log, name: str) -> tuple[NDArray[np.int64], Numbers] | None:
    """Return the steps with a value, and the values, or None with fewer than two values or only zeros."""
    values = log.columns.get(name, np.zeros(0))
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) < 2 or values[finite].min() == values[finite].max() == 0:
        return None
    return log.steps[finite], values[finite]
