"""Find runs whose bound is too low."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..formatting import format_percent, format_range
from .context import MIN_STEPS, Context, Finding

__all__ = ["check_clip_rate"]

MAX_CLIP_RATE = 0.5
"""Maximum share of clipped steps, the same as for `FrequentClippingWarning`.

The bound that `distclip suggest` finds clips 10 % of the steps of that run, and more at a higher learning rate.
"""

NUM_PARTS = 10
"""Number of parts of the run that are checked separately."""


def check_clip_rate(context: Context) -> Iterator[Finding]:
    """Find runs that clip most steps, after the warm-up and in most parts of the run."""
    log, steady = context.log, context.regimes.steady
    if len(log.steps) < MIN_STEPS or not steady or context.outcome.verdict == "diverged":
        return
    start = int(context.regimes.indices[steady[0].start])
    clip_rate = float(log.clipped[start:].mean())
    parts = [float(part.mean()) for part in np.array_split(log.clipped[start:], NUM_PARTS)]
    num_often = sum(part > MAX_CLIP_RATE for part in parts)
    if clip_rate <= MAX_CLIP_RATE or num_often <= NUM_PARTS / 2:
        return
    lr, bounds = log.columns.get("lr"), log.bounds[np.isfinite(log.bounds)]
    at = "" if lr is None or not np.isfinite(lr).any() else f", at learning rate {format_range(lr)}"
    under = f" under a bound of {format_range(bounds)}" if len(bounds) else ""
    scope = f"steps after the warm-up (step {log.steps[start]} on)" if context.regimes.warm_up else "steps"
    # update_clip does not bound norms.
    is_update_clip = str(log.header.get("policy", "")).startswith("update_clip(")
    raised = "raise max_rms" if is_update_clip else "raise the bound to the one that `distclip suggest` finds"
    yield Finding(
        "clip rate",
        "The bound is too low",
        f"{format_percent(clip_rate)} of {len(log.steps) - start:,} {scope} were clipped{under}{at}. The clip rate is "
        f"above {format_percent(MAX_CLIP_RATE)} in {num_often} of {NUM_PARTS} parts of the run, and "
        f"{format_percent(parts[-1])} in the last part. The mean coefficient is {log.coefs[start:].mean():.2g}.",
        "Clipping that often has the effect of a smaller learning rate. If the loss falls as you want, lower the "
        f"learning rate instead. Otherwise {raised}.",
    )
