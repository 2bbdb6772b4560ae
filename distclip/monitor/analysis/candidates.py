"""What a bound would have done to the norms of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .log import Log, Numbers

__all__ = ["Candidate", "bound_in_use", "candidate", "role"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bound.

    Args:
        name: "p90", say.
        bound: NaN for a policy that has no single one.
        clip_rate: part of the steps, 0 to 1.
        mean_coef: of all steps, those that are not clipped with 1.
        longest: clipped steps in a row.
    """

    name: str
    bound: float
    clip_rate: float
    mean_coef: float
    longest: int

    @property
    def role(self) -> str:
        """What a bound is that acts as often."""
        return role(self.clip_rate)


def role(clip_rate: float) -> str:
    """The name for a bound that clips this part of the steps.

    >>> [role(rate) for rate in (0.0, 0.01, 0.2, 0.8)]
    ['inactive', 'safety net', 'limiter', 'normaliser']
    """
    if clip_rate <= 0:
        return "inactive"
    return "safety net" if clip_rate < 0.05 else "limiter" if clip_rate <= 0.5 else "normaliser"


def candidate(name: str, bound: float, norms: Numbers) -> Candidate:
    """A bound on norms that are finite."""
    beyond = norms > bound
    coef = float(np.minimum(bound / norms[beyond], 1).sum() + np.count_nonzero(~beyond)) / len(norms)
    return Candidate(name, bound, float(beyond.mean()), coef, _longest(beyond))


def bound_in_use(log: Log, where: NDArray[np.int64]) -> Candidate | None:
    """What the run's own bound did at some of its steps: the median one, where it moved.

    Args:
        where: indices of steps.
    """
    clipped, coefs, bounds = log.clipped[where], log.coefs[where], log.bounds[where]
    name = "in use"
    if np.isfinite(bounds).any():
        bound = float(np.nanmedian(bounds))
        if np.nanmin(bounds) < np.nanmax(bounds):
            name = "in use (median)"
    elif clipped.any():
        # A log without bounds: what the clipped steps were shortened to, if it is the same for all.
        left = (log.norms[where] * coefs)[clipped]
        bound = float(np.median(left)) if np.ptp(left) < 0.01 * np.median(left) else float("nan")
    else:
        return None
    return Candidate(name, bound, float(clipped.mean()), float(coefs.mean()), _longest(clipped))


def _longest(flags: NDArray[np.bool_]) -> int:
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return int((stops - starts).max()) if len(starts) else 0
