"""Which part of the squared norm a single tensor has."""

from __future__ import annotations

import numpy as np

from .log import Log

__all__ = ["MOST", "dominant"]

MOST = 0.5
"""Of the squared norm: from here on the norm of the whole is this tensor's, and a bound on it too."""


def dominant(log: Log) -> tuple[str, float] | None:
    """The tensor that carries more than half of the squared norm, in the median over the steps, with its share.

    Of one or two tensors one always does: they are not looked at.
    """
    if len(log.tensors) < 3:
        return None
    squares = np.where(log.tensor_norms >= 0, log.tensor_norms, np.inf)
    # By its largest, so that no square overflows; a step with a norm that is not finite has no shares.
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = (squares / squares.max(axis=1, keepdims=True)) ** 2
        shares = squares / squares.sum(axis=1, keepdims=True)
    shares = shares[np.isfinite(shares).all(axis=1)]
    if not len(shares):
        return None
    medians = np.median(shares, axis=0)
    most = int(medians.argmax())
    return (log.tensors[most], float(medians[most])) if medians[most] > MOST else None
