"""Find runs that diverged without another cause: the learning rate is too high."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..formatting import format_number
from .context import WARNING_STEPS, Context, Finding

__all__ = ["check_divergence"]


def check_divergence(context: Context) -> Iterator[Finding]:
    """Find a run that diverged, if no faulty sample, rank or number explains it."""
    outcome = context.outcome
    if outcome.verdict != "diverged" or context.findings:
        return
    yield Finding("divergence", "Training diverged", f"{outcome.text} {_describe_norms(context)}", _advise(context))


def _describe_norms(context: Context) -> str:
    """Describe the last norms before they stopped being finite, or how the norms moved."""
    log = context.log
    if not log.finite[-1] and len(context.nonfinite_starts) and (end := int(context.nonfinite_starts[-1])):
        recent = log.norms[max(0, end - WARNING_STEPS) : end]
        if np.isfinite(recent).any():
            return (
                f"In the {len(recent)} steps before, the norms reached {np.nanmax(recent):.3g}, from a median of "
                f"{np.nanmedian(log.norms[:end]):.3g}."
            )
    finite = log.norms[np.isfinite(log.norms)]
    if not len(finite):
        return "No norm is finite."
    first = float(np.median(finite[: max(1, min(5, len(finite)))]))
    return f"The norms went from {format_number(first)} to {format_number(float(np.median(finite[-20:])))}."


def _advise(context: Context) -> str:
    log = context.log
    clips = bool(log.clipped.any())
    first = (
        "Lower the bound or the learning rate"
        if clips
        else "Clip, for example by global_norm(1.0), or lower the learning rate"
    )
    return (
        f"{first}, and start again, or resume from a checkpoint before the loss rose. Take no bound from the norms of "
        "this run: record a run that learns."
    )
