"""How far a norm stands out of those around it."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .log import Log, Numbers

__all__ = ["SPIKE", "spikes_of"]

SPIKE = 3.0
"""Times the median of the norms around: what a spike is at least."""

SCATTER = 5.0
"""Deviations of log-norms from that median: beyond it, norms that scatter widely do not have spikes all the time."""

WINDOW = 128


def spikes_of(log: Log) -> NDArray[np.int64]:
    """Indices of the steps whose norms are finite and stand out of the 128 around them, on either side.

    (A recorder, which does not know what is to come, compares with those before.)
    """
    where = np.flatnonzero(np.isfinite(log.norms) & (log.norms > 0))
    if not len(where):
        return where
    norms = np.log(log.norms[where])
    above = norms - _surroundings(norms)
    scatter = 1.4826 * float(np.median(np.abs(above)))
    found: NDArray[np.int64] = where[above > max(math.log(SPIKE), SCATTER * scatter)]
    return found


def _surroundings(values: Numbers) -> Numbers:
    """The median of the window around each half window of values."""
    if len(values) <= WINDOW:
        return np.full(len(values), np.median(values))
    half = WINDOW // 2
    windows = sliding_window_view(values, WINDOW)[::half]
    medians = np.median(windows, axis=1)
    # Window i begins at i·half: the half in its middle is what it is about.
    place = np.clip((np.arange(len(values)) - half // 2) // half, 0, len(medians) - 1)
    surroundings: Numbers = medians[place]
    return surroundings
