"""How often which norm was seen, for a page and for pictures alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..analysis.log import Log, Numbers
from .palette import QUANTILES
from .words import median

__all__ = ["Histogram", "histograms"]

BINS = 60
"""At most."""


@dataclass(frozen=True)
class Histogram:
    """Of the logarithms of a run's norms.

    Args:
        run: which.
        edges: (bins + 1,) of the bins, as norms; the same for all runs.
        shares: (bins,) of its finite norms, in %.
        quantiles: by percentile: the norm, and the share of its bin.
        bound: the median of those that were allowed; NaN if there was none.
    """

    run: int
    edges: Numbers
    shares: Numbers
    quantiles: dict[int, tuple[float, float]]
    bound: float


def histograms(logs: Sequence[Log]) -> list[Histogram]:
    """Of each run that has a norm above 0."""
    norms = [log.norms[np.isfinite(log.norms) & (log.norms > 0)] for log in logs]
    sizes = [len(each) for each in norms if len(each)]
    if not sizes:
        return []
    low = math.log10(min(each.min() for each in norms if len(each)))
    high = math.log10(max(each.max() for each in norms if len(each)))
    margin = 0.05 if high - low < 1e-6 else 0.0
    bins = max(10, min(BINS, math.isqrt(max(sizes)) * 2))
    edges = np.linspace(low - margin, high + margin, bins + 1)
    found = []
    for run, (log, each) in enumerate(zip(logs, norms, strict=True)):
        if len(each):
            counts, _ = np.histogram(np.log10(each), edges)
            shares = 100 * counts / len(each)
            quantiles = {}
            for level in QUANTILES:
                norm = float(np.percentile(each, level))
                place = int(np.searchsorted(edges, math.log10(norm), side="right")) - 1
                quantiles[level] = (norm, float(shares[min(max(place, 0), bins - 1)]))
            found.append(Histogram(run, 10**edges, shares, quantiles, median(log.bounds)))
    return found
