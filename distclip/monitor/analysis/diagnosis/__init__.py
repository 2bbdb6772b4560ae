"""Find problems of a run by rules that show their evidence, one rule per module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..log import Log
from ..outcome import Outcome, find_outcome
from .bad_data import check_bad_data
from .clip_rate import check_clip_rate
from .context import Context, Finding
from .divergence import check_divergence
from .dominant_tensor import check_dominant_tensor
from .hardware import check_hardware
from .numerics import check_numerics
from .old_moments import check_old_moments
from .replays import check_replays
from .warm_up import check_warm_up

__all__ = ["Finding", "Outcome", "diagnose", "find_outcome"]

RULES: Sequence[Callable[[Context], Iterator[Finding]]] = (
    check_replays,
    check_hardware,
    check_bad_data,
    check_numerics,
    check_old_moments,
    check_divergence,
    check_warm_up,
    check_clip_rate,
    check_dominant_tensor,
)
"""All rules. A rule can depend on earlier findings: a divergence counts only if it has no other cause."""


def diagnose(log: Log) -> list[Finding]:
    """Find the problems of a run.

    Args:
        log: log of any length.

    Returns:
        The findings of all rules, causes first; empty for a run without problems, and for one of less than 50 steps
        without outliers.
    """
    context = Context(log)
    for rule in RULES:
        context.findings += rule(context)
    return context.findings
