"""Find runs that need a warm-up of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..spikes import SPIKE_FACTOR
from .context import MIN_STEPS, START, WARNING_STEPS, Context, Finding

__all__ = ["check_warm_up"]

LOSS_FACTOR = 2.0
"""Minimum ratio of a loss to the first one for an explosion of the loss."""

GRADUAL_FACTOR = 1.5
"""Minimum ratio of the norms right after the initial spikes to the usual norm for a gradual decrease."""


def check_warm_up(context: Context) -> Iterator[Finding]:
    """Find spikes of the norm or of the loss that occur only in the first steps."""
    log, spikes = context.log, _without_initial_decrease(context)
    end = max(WARNING_STEPS, int(START * len(log.steps)))
    if len(log.steps) < MIN_STEPS or context.outcome.verdict == "diverged":
        return
    if (finding := _check_losses(context, end)) is not None:
        yield finding
        return
    if len(spikes) < 3 or spikes[-1] >= end:
        return
    later = log.norms[end:]
    later = later[np.isfinite(later)]
    if not len(later):
        return
    worst = int(spikes[log.norms[spikes].argmax()])
    if (log.norms * log.coefs)[spikes].max() <= SPIKE_FACTOR * np.median(later):
        return  # the bound has made them as harmless as any other step
    last_spike = int(log.steps[spikes[-1]])
    yield Finding(
        "warm-up",
        "Spikes in the first steps only",
        f"{len(spikes)} steps stand out from the steps around them, all of them up to step {last_spike} of "
        f"{log.steps[-1]}. The largest norm is {log.norms[worst]:.3g}, at step {log.steps[worst]}. From step "
        f"{log.steps[end]} on the median is {np.median(later):.3g}.",
        f"Increase the learning rate gradually over at least the first {_round_up(last_spike)} steps, and keep the "
        "bound (an adaptive policy needs a cap there).",
    )


def _check_losses(context: Context, end: int) -> Finding | None:
    """Find losses far above the first one that occur only in the first steps.

    Args:
        context: context of the run.
        end: index after the first steps.
    """
    log, losses, start = context.log, context.log.columns.get("loss"), context.outcome.start
    if losses is None or not start > 0:
        return None
    high = np.flatnonzero(losses > LOSS_FACTOR * start)
    if len(high) < 3 or high[-1] >= end:
        return None
    last = int(log.steps[high[-1]])
    return Finding(
        "warm-up",
        "The loss explodes in the first steps only",
        f"{len(high)} losses are more than {LOSS_FACTOR:g} times the first, {start:.3g}, all of them up to step {last} "
        f"of {log.steps[-1]}. The largest is {np.nanmax(losses):.3g}. The largest norm in these steps is "
        f"{np.nanmax(log.norms[:end]):.3g}, and the median after them is {np.nanmedian(log.norms[end:]):.3g}.",
        f"Increase the learning rate gradually over at least the first {_round_up(last)} steps, and clip.",
    )


def _without_initial_decrease(context: Context) -> NDArray[np.int64]:
    """Return the spikes without those at the start of a run whose norms then decrease gradually.

    Many networks have large gradients after the initialisation, at any learning rate.
    """
    spikes, norms = context.spikes, context.log.norms
    # Up to a dense spike, at least every other step is a spike.
    dense = np.flatnonzero(2 * np.arange(1, len(spikes) + 1) > spikes)
    if not len(dense):
        return spikes
    last = int(spikes[dense[-1]])
    after = norms[last + 1 : last + 2 + max(3, last)]
    gradual = np.isfinite(after).any() and np.nanmedian(after) > GRADUAL_FACTOR * np.nanmedian(norms)
    return spikes[dense[-1] + 1 :] if gradual else spikes


def _round_up(steps: int) -> int:
    """Round up to one significant digit."""
    power: int = 10 ** (len(str(steps)) - 1)
    return -(-steps // power) * power
