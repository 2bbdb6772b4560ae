"""Compute robust statistics of a log's columns."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Numbers", "finite_median", "robust_scale"]

Numbers: TypeAlias = NDArray[np.float64]
"""Column of a log, one number per step."""


def robust_scale(deviations: Numbers) -> float:
    """Estimate the standard deviation of values that may contain outliers.

    Args:
        deviations: (n,) with n >= 1, differences from the center of the values.

    >>> robust_scale(np.array([-1.0, 1.0, 1000.0]))
    1.4826
    """
    # The factor makes the median absolute deviation equal to the standard deviation of a normal distribution.
    return 1.4826 * float(np.median(np.abs(deviations)))


def finite_median(values: Numbers) -> float:
    """Return the median of the finite values, or NaN if there are none.

    >>> finite_median(np.array([1.0, np.nan, 3.0]))
    2.0
    """
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan
