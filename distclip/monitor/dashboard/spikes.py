"""The steps that stood out, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..analysis.log import Culprit, Log, Spike
from .words import NOTHING, listed, percent, plain, short

__all__ = ["Row", "rows"]

MOST = 25
"""Of a run, of each of both kinds: those that are finite and those that are not."""


@dataclass(frozen=True, slots=True)
class Row:
    """One step.

    Args:
        run: which.
        step: which.
        norm, ratio, rank, tensor, ids: of its spike, as text.
        nonfinite: whose elements were not finite, as text; empty for a finite step.
    """

    run: int
    step: int
    norm: str
    ratio: str
    rank: str
    tensor: str
    ids: str
    nonfinite: str


def rows(logs: Sequence[Log]) -> tuple[list[Row], list[str]]:
    """By run and step; and a sentence on those that are left out."""
    found, notes = [], []
    for run, log in enumerate(logs):
        blamed: dict[int, list[Culprit]] = {}
        for culprit in log.culprits:
            blamed.setdefault(culprit.step, []).append(culprit)
        spikes = {spike.step: spike for spike in log.spikes}
        # A log that was written by hand has steps without a norm, and says nothing else of them.
        lost = set(log.steps[~log.finite].tolist()) | set(blamed)
        wild = [spike for spike in log.spikes if spike.step not in lost]
        wild.sort(key=lambda spike: np.nan_to_num(spike.ratio, nan=0.0), reverse=True)
        shown = sorted(lost)[:MOST] + [spike.step for spike in wild[:MOST]]
        found += [_row(run, step, spikes.get(step), blamed.get(step), step in lost) for step in sorted(shown)]
        if len(lost) + len(wild) > len(shown):
            left_out = f"the first {min(MOST, len(lost))} of {len(lost):,} that were not finite" if lost else ""
            largest = f"the {min(MOST, len(wild))} largest of {len(wild):,} spikes" if wild else ""
            notes.append(f"{plain(log.name)}: {' and '.join(filter(None, [left_out, largest]))} are shown.")
    return found, notes


def _row(run: int, step: int, spike: Spike | None, culprits: Sequence[Culprit] | None, lost: bool) -> Row:
    if spike is None:
        spike = Spike(step, math.nan, math.nan)
    share = "" if math.isnan(spike.share) else f" ({percent(spike.share)} of the squared norm)"
    return Row(
        run,
        step,
        "not finite" if math.isnan(spike.norm) else short(spike.norm),
        NOTHING if math.isnan(spike.ratio) else f"{short(spike.ratio)} x",
        NOTHING if spike.rank is None else str(spike.rank),
        NOTHING if spike.tensor is None else plain(spike.tensor) + share,
        listed(spike.ids, 8) or NOTHING,
        listed((_blame(each) for each in culprits or ()), 4) or ("unknown" if lost else ""),
    )


def _blame(culprit: Culprit) -> str:
    counts = " and ".join(f"{n:,} {kind}" for n, kind in ((culprit.nans, "NaN"), (culprit.infs, "Inf")) if n)
    ranks = ", ".join(map(str, culprit.ranks))
    on = f", rank{'s' * (len(culprit.ranks) > 1)} {ranks}" if ranks else ""
    return f"{plain(culprit.name)} ({counts}{on})"
