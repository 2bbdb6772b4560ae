"""Find spikes of the loss after Adam steps whose second moments were too old for the gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...jsonl import UPDATE_RMS_ALARM
from ..alarms import find_update_alarms, find_update_tensor
from ..formatting import format_list, format_number, pluralize
from .context import Context, Finding

__all__ = ["check_old_moments"]

WITHIN = 16
"""Number of steps after an alarm in which a rise of the loss counts as its consequence."""

BEFORE = 128
"""Number of steps before an alarm whose losses count as usual."""

DEVIATIONS = 6.0
"""Number of standard deviations above the mean at which a loss is unusual."""


def check_old_moments(context: Context) -> Iterator[Finding]:
    """Find Adam steps with moments that were too old, if the loss rose after them or was not recorded."""
    log = context.log
    alarms = find_update_alarms(log)
    followed = [index for index in alarms if _rises_after(context, index)]
    # Rare tokens and the end of a plateau cause such steps in runs that learn well.
    if not alarms or ("loss" in log.columns and not followed):
        return
    rms = log.columns["update_rms"]
    worst = max(alarms, key=lambda index: float(rms[index]))
    of = find_update_tensor(log, worst)
    evidence = (
        f"At {pluralize(len(alarms), 'time')} gradients were at least {UPDATE_RMS_ALARM:g} times the roots of Adam's "
        f"second moments, first at step {log.steps[alarms[0]]:,}, most at step {log.steps[worst]:,} "
        f"({format_number(float(rms[worst]))} times{of and ', in '}{of})."
    )
    if "loss" in log.columns:
        steps = format_list([f"{log.steps[index]:,}" for index in followed])
        evidence += f" The loss rose within {WITHIN} steps of {steps}."
    is_used = str(log.header.get("policy", "")).startswith("update_clip(")
    remedy = (
        "update_clip bounds such steps already. To have fewer of them, use a lower beta2"
        if is_used
        else "Use distclip.update_clip(), which shortens such steps, or a lower beta2"
    )
    yield Finding(
        "old moments",
        "Adam's second moments were too old for the gradients",
        evidence,
        f"{remedy}, such as 0.95. Check what changes in the data at these steps, and parameters that had no gradient "
        "before.",
    )


def _rises_after(context: Context, index: int) -> bool:
    losses = context.log.columns.get("loss")
    if losses is None:
        return False
    usual = losses[max(0, index - BEFORE) : index + 1]
    usual, after = usual[np.isfinite(usual)], losses[index + 1 : index + 1 + WITHIN]
    if len(usual) < 2:
        return False
    return bool(np.any(after > usual.mean() + DEVIATIONS * usual.std()))
