"""Find problems of a run by rules that show their evidence, one rule per module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..log import Log
from .bad_data import check_bad_data
from .clip_rate import check_clip_rate
from .context import Context, Finding
from .divergence import check_divergence
from .dominant_tensor import check_dominant_tensor
from .numerics import check_numerics
from .warm_up import check_warm_up

__all__ = ["Finding", "diagnose"]

RULES: Sequence[Callable[[Context], Iterator[Finding]]] = (
    check_divergence,
    check_bad_data,
    check_numerics,
    check_warm_up,
    check_clip_rate,
    check_dominant_tensor,
)
"""All rules, the most severe problem first."""


def diagnose(log: Log) -> list[Finding]:
    """Find the problems of a run.

    Args:
        log: of any length.

    Returns:
        The findings of all rules; empty for a run without problems.
    """
    context = Context(log)
    return [finding for rule in RULES for finding in rule(context)]
