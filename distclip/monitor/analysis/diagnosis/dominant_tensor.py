"""Find a tensor that makes up most of the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..formatting import format_percent
from ..log import Log, once_per_log
from .context import Context, Finding

__all__ = ["check_dominant_tensor", "find_dominant_tensor"]

MIN_SHARE = 0.65
"""Share of the squared norm above which a bound on the total norm is in effect a bound on one tensor.

The first or the last layer of a small network often has a little more than half.
"""


def check_dominant_tensor(context: Context) -> Iterator[Finding]:
    """Find a tensor that makes up most of the gradient."""
    # A policy with a bound for each tensor does not bound the total norm.
    if context.log.header.get("per") in ("tensor", "row") or (dominant := find_dominant_tensor(context.log)) is None:
        return
    name, share = dominant
    yield Finding(
        "dominant tensor",
        f"{name} is most of the gradient",
        f"{name} has {format_percent(share)} of the squared norm (median over {len(context.log.tensor_steps):,} "
        f"steps) among {len(context.log.tensors)} tensors.",
        "A bound on the total norm is in effect a bound on this tensor, and it shortens the other tensors too. Check "
        "its initialisation and learning rate, or give it a separate bound: "
        f'distclip.group_norm({{"own": ("^{name}$", …)}}, …).',
    )


@once_per_log
def find_dominant_tensor(log: Log) -> tuple[str, float] | None:
    """Find the tensor with most of the squared norm, in the median over the steps.

    Returns:
        Its name and its share, or None. With only one or two tensors, one always dominates, so there is none.
    """
    if len(log.tensors) < 3:
        return None
    squares = np.where(log.tensor_norms >= 0, log.tensor_norms, np.inf)
    # Dividing by the largest norm keeps the squares from overflowing. A step with a non-finite norm has no shares.
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = (squares / squares.max(axis=1, keepdims=True)) ** 2
        shares = squares / squares.sum(axis=1, keepdims=True)
    shares = shares[np.isfinite(shares).all(axis=1)]
    if not len(shares):
        return None
    medians = np.median(shares, axis=0)
    largest = int(medians.argmax())
    return (log.tensors[largest], float(medians[largest])) if medians[largest] > MIN_SHARE else None
