"""Find runs that diverged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .context import WARNING_STEPS, Context, Finding

__all__ = ["check_divergence"]


def check_divergence(context: Context) -> Iterator[Finding]:
    """Find norms that grow until they are not finite, and do not become finite again."""
    log = context.log
    if not len(context.nonfinite_starts) or log.finite[-1]:
        return
    end = int(context.nonfinite_starts[-1])
    if len(log.steps) - end < WARNING_STEPS or end == 0 or not context.has_spike_before(end):
        return
    recent = log.norms[max(0, end - WARNING_STEPS) : end]
    yield Finding(
        "divergence",
        "Training diverged",
        f"No norm from step {log.steps[end]} to the end, step {log.steps[-1]}, is finite. In the {len(recent)} steps "
        f"before, the norms reached {np.nanmax(recent):.3g}, from a median of {np.nanmedian(log.norms[:end]):.3g}.",
        "Clip, or lower the learning rate, and resume from a checkpoint before that step. `distclip suggest` finds a "
        "bound from a run at a lower learning rate.",
    )
