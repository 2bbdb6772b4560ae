"""Find steps with outlier norms, and parse the details that a recorder wrote about them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .statistics import Numbers, robust_scale

__all__ = [
    "SPIKE_FACTOR",
    "Culprit",
    "Difference",
    "Spike",
    "find_spikes",
    "parse_culprits",
    "parse_differences",
    "parse_number",
    "parse_spike",
]

SPIKE_FACTOR = 3.0
"""Minimum ratio of a spike's norm to the median of the norms around it."""

MIN_DEVIATIONS = 5.0
"""Minimum distance of a spike from that median, in robust standard deviations of the log-norms."""

WINDOW = 128
"""Number of norms around a step that its norm is compared with."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A step that the recorder described in more detail because its norm was an outlier or not finite.

    Args:
        step: number of the step.
        norm: norm before clipping; NaN if it was not finite.
        ratio: norm divided by the running median before the step; NaN if there was no median or no finite norm.
        ids: ids of the samples of its batch, on all ranks; empty if the run noted none.
        rank: rank that held the largest part of the norm; None if all ranks held the same.
        tensor: tensor with the largest gradient on that rank; None if unknown.
        share: share of that gradient in the squared norm, 0 to 1; NaN if unknown.
    """

    step: int
    norm: float
    ratio: float
    ids: tuple[int | str, ...] = ()
    rank: int | None = None
    tensor: str | None = None
    share: float = float("nan")


@dataclass(frozen=True, slots=True)
class Culprit:
    """A gradient with non-finite elements at a step. Its text is that of `distclip.Culprit`.

    Args:
        step: number of the step.
        name: name of the parameter.
        nans: number of NaN on all `ranks` together.
        infs: number of infinite elements.
        ranks: ranks that held them; empty for a single process.

    >>> print(Culprit(7, "weight", 2, 1, (0, 3)))
    weight (2 NaN and 1 Inf on ranks 0, 3)
    """

    step: int
    name: str
    nans: int
    infs: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        counts = [f"{n} {kind}" for n, kind in ((self.nans, "NaN"), (self.infs, "Inf")) if n]
        on = f" on rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.name} ({' and '.join(counts)}{on})"


@dataclass(frozen=True, slots=True)
class Difference:
    """Replicas of one tensor that differed at a step.

    Args:
        step: number of the step.
        name: name of the parameter.
        ranks: ranks whose replicas deviated; empty if unknown.
    """

    step: int
    name: str
    ranks: tuple[int, ...]


def find_spikes(norms: Numbers) -> NDArray[np.int64]:
    """Find the steps whose norm is much larger than the 128 norms around it.

    A recorder does not have later norms, so it compares a step with the norms before it instead.

    Args:
        norms: (n,) norms before clipping; NaN where a norm was not finite.

    Returns:
        Indices of the spikes, increasing.
    """
    indices = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    if not len(indices):
        return indices
    logs = np.log(norms[indices])
    deviations = logs - _local_medians(logs)
    # Without the second bound, runs with widely scattered norms would have spikes all the time.
    least = max(math.log(SPIKE_FACTOR), MIN_DEVIATIONS * robust_scale(deviations))
    spikes: NDArray[np.int64] = indices[deviations > least]
    return spikes


def _local_medians(values: Numbers) -> Numbers:
    """Return for each value the median of a window around it.

    All values of a half window share one median.
    """
    if len(values) <= WINDOW:
        return np.full(len(values), np.median(values))
    half = WINDOW // 2
    windows = sliding_window_view(values, WINDOW)[::half]
    medians = np.median(windows, axis=1)
    # Window i begins at i * half and describes the half window in its middle.
    window_of = np.clip((np.arange(len(values)) - half // 2) // half, 0, len(medians) - 1)
    local: Numbers = medians[window_of]
    return local


def parse_spike(step: int, line: Mapping[str, Any]) -> Spike | None:
    """Parse the details of a step, or return None if its line has none."""
    if not ("spike" in line or "ids" in line or "worst" in line):
        return None
    ids, worst = line.get("ids"), line.get("worst")
    if not isinstance(worst, dict):
        worst = {}
    rank, tensor = worst.get("rank"), worst.get("tensor")
    return Spike(
        step,
        parse_number(line.get("norm")),
        parse_number(line.get("spike")),
        tuple(sample for sample in ids if isinstance(sample, (int, str))) if isinstance(ids, list) else (),
        rank if isinstance(rank, int) else None,
        tensor if isinstance(tensor, str) else None,
        parse_number(worst.get("share")),
    )


def parse_culprits(step: int, line: Mapping[str, Any]) -> Iterator[Culprit]:
    """Parse the gradients of a step that were not finite."""
    culprits = line.get("culprits")
    for culprit in culprits if isinstance(culprits, list) else ():
        if isinstance(culprit, dict) and isinstance(culprit.get("name"), str):
            ranks = culprit.get("ranks")
            yield Culprit(
                step,
                culprit["name"],
                _parse_count(culprit.get("nans")),
                _parse_count(culprit.get("infs")),
                tuple(rank for rank in ranks if isinstance(rank, int)) if isinstance(ranks, list) else (),
            )


def parse_differences(step: int, line: Mapping[str, Any]) -> Iterator[Difference]:
    """Parse the replicas that differed at a step."""
    differences = line.get("replicas")
    for difference in differences if isinstance(differences, list) else ():
        if isinstance(difference, dict) and isinstance(difference.get("name"), str):
            ranks = difference.get("ranks")
            known = tuple(rank for rank in ranks if isinstance(rank, int)) if isinstance(ranks, list) else ()
            yield Difference(step, difference["name"], known)


def parse_number(value: Any) -> float:
    """Return a finite number as a float, or NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        value = float(value)
    except OverflowError:  # an integer of 400 digits
        return math.nan
    return value if math.isfinite(value) else math.nan


def _parse_count(value: Any) -> int:
    return value if isinstance(value, int) else 0
