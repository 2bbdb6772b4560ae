"""Compute the distributions of the norms for the page and the PNGs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..analysis.log import Log
from ..analysis.statistics import Numbers, finite_median
from .palette import QUANTILES

__all__ = ["Histogram", "make_histograms"]

MAX_BINS = 60
"""Maximum number of bins."""


@dataclass(frozen=True)
class Histogram:
    """Histogram of the logarithms of a run's norms.

    Args:
        run: index of the run.
        edges: (bins + 1,) edges of the bins, as norms; the same for all runs.
        shares: (bins,) share of the finite norms, in percent.
        quantiles: (norm, share of its bin) by percentile.
        bound: median of the bounds; NaN without bounds.
    """

    run: int
    edges: Numbers
    shares: Numbers
    quantiles: dict[int, tuple[float, float]]
    bound: float


def make_histograms(logs: Sequence[Log]) -> list[Histogram]:
    """Compute a histogram of each run that has a norm above 0."""
    norms = [log.norms[np.isfinite(log.norms) & (log.norms > 0)] for log in logs]
    sizes = [len(column) for column in norms if len(column)]
    if not sizes:
        return []
    low = math.log10(min(column.min() for column in norms if len(column)))
    high = math.log10(max(column.max() for column in norms if len(column)))
    # If all norms are equal, the bins still need a width.
    margin = 0.05 if high - low < 1e-6 else 0.0
    num_bins = max(10, min(MAX_BINS, math.isqrt(max(sizes)) * 2))
    edges = np.linspace(low - margin, high + margin, num_bins + 1)
    histograms = []
    for run, (log, column) in enumerate(zip(logs, norms, strict=True)):
        if len(column):
            counts, _ = np.histogram(np.log10(column), edges)
            shares = 100 * counts / len(column)
            quantiles = {}
            for level in QUANTILES:
                norm = float(np.percentile(column, level))
                bin_index = int(np.searchsorted(edges, math.log10(norm), side="right")) - 1
                quantiles[level] = (norm, float(shares[min(max(bin_index, 0), num_bins - 1)]))
            histograms.append(Histogram(run, 10**edges, shares, quantiles, finite_median(log.bounds)))
    return histograms
