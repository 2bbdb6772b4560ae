"""List the outlier steps as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..analysis.formatting import MISSING, format_list, format_number, format_percent, printable
from ..analysis.log import Log
from ..analysis.spikes import Culprit, Spike

__all__ = ["SpikeRow", "make_spike_rows"]

MAX_STEPS = 25
"""Maximum number of finite steps per run, and of non-finite steps."""


@dataclass(frozen=True, slots=True)
class SpikeRow:
    """One step. All fields but the first two are text.

    Args:
        run: index of the run.
        step: number of the step.
        norm: norm before clipping.
        ratio: ratio of the norm to the median before it.
        rank: rank with the largest part of the norm.
        tensor: tensor with the largest gradient on that rank.
        ids: ids of the samples.
        culprits: gradients with non-finite elements; empty for a finite step.
    """

    run: int
    step: int
    norm: str
    ratio: str
    rank: str
    tensor: str
    ids: str
    culprits: str


def make_spike_rows(logs: Sequence[Log]) -> tuple[list[SpikeRow], list[str]]:
    """Return the rows and notes about steps that are not shown.

    Steps that are not finite come first, in order. The others follow by their ratio to the median, in descending order.
    """
    rows: list[tuple[float, SpikeRow]] = []
    notes = []
    for run, log in enumerate(logs):
        culprits: dict[int, list[Culprit]] = {}
        for culprit in log.culprits:
            culprits.setdefault(culprit.step, []).append(culprit)
        spikes = {spike.step: spike for spike in log.spikes}
        # A log that was written by hand has no details about its non-finite steps.
        nonfinite = set(log.steps[~log.finite].tolist()) | set(culprits)
        finite = [spike for spike in log.spikes if spike.step not in nonfinite]
        finite.sort(key=lambda spike: np.nan_to_num(spike.ratio, nan=0.0), reverse=True)
        shown = sorted(nonfinite)[:MAX_STEPS] + [spike.step for spike in finite[:MAX_STEPS]]
        sizes = dict.fromkeys(nonfinite, math.inf) | {spike.step: spike.ratio for spike in finite}
        rows += [
            (sizes[step], _make_row(run, step, spikes.get(step), culprits.get(step, ()), step in nonfinite))
            for step in shown
        ]
        if len(nonfinite) + len(finite) > len(shown):
            parts = []
            if nonfinite:
                parts.append(f"the first {min(MAX_STEPS, len(nonfinite))} of {len(nonfinite):,} non-finite steps")
            if finite:
                parts.append(f"the {min(MAX_STEPS, len(finite))} largest of {len(finite):,} spikes")
            notes.append(f"{printable(log.name)}: the table shows {' and '.join(parts)}.")
    rows.sort(key=lambda pair: np.nan_to_num(pair[0], nan=0.0, posinf=np.inf), reverse=True)
    return [row for _, row in rows], notes


def _make_row(run: int, step: int, spike: Spike | None, culprits: Sequence[Culprit], nonfinite: bool) -> SpikeRow:
    if spike is None:
        spike = Spike(step, math.nan, math.nan)
    share = "" if math.isnan(spike.share) else f" ({format_percent(spike.share)} of the squared norm)"
    return SpikeRow(
        run,
        step,
        "not finite" if math.isnan(spike.norm) else format_number(spike.norm),
        MISSING if math.isnan(spike.ratio) else f"{format_number(spike.ratio)} x",
        MISSING if spike.rank is None else str(spike.rank),
        MISSING if spike.tensor is None else printable(spike.tensor) + share,
        format_list(spike.ids, 8) or MISSING,
        format_list(culprits, 4) or ("unknown" if nonfinite else ""),
    )
