"""The table of several runs: a fact a row, a run a column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.log import Log
from .verdicts import Verdict
from .words import NOTHING, listed, median, percent, plain, short, whole

__all__ = ["Fact", "facts"]

KNOWN = {"distclip", "format", "time", "policy", "per", "slots", "tensors", "every"}
"""What a header says of which the table says it in its own way, or not."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A row.

    Args:
        label: what it is.
        cells: of each run.
        text: whether they are words, not numbers.
    """

    label: str
    cells: tuple[str, ...]
    text: bool = False


def facts(logs: Sequence[Log], verdicts: Sequence[Verdict]) -> list[Fact]:
    """The rows that any of the runs has something for."""
    found = [Fact("policy", tuple(_header(log, "policy") for log in logs), True)]
    found += [
        Fact(plain(key).replace("_", " "), tuple(_header(log, key) for log in logs), True)
        for key in dict.fromkeys(key for log in logs for key in log.header if key not in KNOWN)
    ]
    found += [Fact(label, tuple(of(log) for log in logs)) for label, of in ROWS.items()]
    found.append(Fact("suggested bound (p75 … p95)", tuple(verdict.bound for verdict in verdicts)))
    return [fact for fact in found if any(cell != NOTHING for cell in fact.cells)]


def _header(log: Log, key: str) -> str:
    value = log.header.get(key)
    if isinstance(value, (list, tuple)):
        return listed(value, 4) or NOTHING
    return NOTHING if value is None else plain(value)


def _norm(level: float) -> Callable[[Log], str]:
    def percentile(log: Log) -> str:
        finite = log.norms[np.isfinite(log.norms)]
        return short(float(np.percentile(finite, level))) if len(finite) else NOTHING

    return percentile


def _bound(log: Log) -> str:
    finite = log.bounds[np.isfinite(log.bounds)]
    if not len(finite):
        return NOTHING
    low, high = float(finite.min()), float(finite.max())
    return short(low) if low == high else f"{short(low)} … {short(high)}, median {short(median(finite))}"


def _coef(log: Log) -> str:
    finite = log.coefs[np.isfinite(log.coefs) & log.finite]
    return short(float(finite.mean())) if len(finite) else NOTHING


def _last_loss(log: Log) -> str:
    loss = log.columns.get("loss", np.zeros(0))
    known = np.flatnonzero(np.isfinite(loss))
    if not len(known):
        return NOTHING
    last = int(known[-1])
    # One that ends early tells more than its value.
    ended = f" (step {whole(log.steps[last])})" if last < 0.9 * (len(loss) - 1) else ""
    return short(float(loss[last])) + ended


def _least_loss(log: Log) -> str:
    loss = log.columns.get("loss", np.zeros(0))
    return short(float(np.nanmin(loss))) if np.isfinite(loss).any() else NOTHING


def _summary(key: str) -> Callable[[Log], str]:
    def outcome(log: Log) -> str:
        summary: Mapping[str, Any] = log.summary or {}
        value = summary.get(key)
        if value is None:
            # The launcher has no other word for a held-out loss that is NaN.
            return "not finite" if key == "held_out" and key in summary else NOTHING
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return short(float(value)) if number else plain(value)

    return outcome


def _counted(number: int, of: int) -> str:
    return whole(number) if not number or not of else f"{whole(number)} ({percent(number / of)})"


ROWS: dict[str, Callable[[Log], str]] = {
    "steps": lambda log: whole(len(log.steps)),
    "norm, median": _norm(50),
    "norm, p90": _norm(90),
    "norm, p99": _norm(99),
    "norm, max": _norm(100),
    "bound": _bound,
    "clip rate": lambda log: percent(float(log.clipped.mean()) if len(log.clipped) else math.nan),
    "mean coefficient": _coef,
    "skipped": lambda log: _counted(int(log.skipped.sum()), len(log.steps)),
    "not finite": lambda log: _counted(int((~log.finite).sum()), len(log.steps)),
    "loss, last": _last_loss,
    "loss, least": _least_loss,
    "held-out loss": _summary("held_out"),
    "blind guess": _summary("guess"),
    "held-out R²": _summary("r2"),
    "lines that could not be read": lambda log: whole(log.torn) if log.torn else NOTHING,
}
