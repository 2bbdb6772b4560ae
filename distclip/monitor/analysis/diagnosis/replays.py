"""Report the causes that replays of outliers have found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..formatting import format_list
from .context import Context, Finding

__all__ = ["check_replays"]

ADVICE = {
    "data": "Inspect the sample, and repair it or leave it out.",
    "numerics": "Use bfloat16 instead of float16, or compute the layers with the largest norms in float32.",
    "hardware": "Repeat the step on other hardware, and test the memory of the rank.",
    "optimizer state": "Lower the learning rate or Adam's beta2, or clip the updates.",
}
"""Remedy by verdict."""


def check_replays(context: Context) -> Iterator[Finding]:
    """Report each cause that replays have found, with the evidence of the largest outlier."""
    by_verdict: dict[str, list[Any]] = {}
    for replay in context.log.replays:
        if (verdict := replay.get("verdict")) in ADVICE and isinstance(replay.get("evidence"), str):
            by_verdict.setdefault(verdict, []).append(replay)
    for verdict, replays in by_verdict.items():
        worst = max(replays, key=lambda replay: _number(replay.get("ratio")))
        steps = format_list([replay["step"] for replay in replays])
        yield Finding(
            "replay",
            f"A replay names the cause: {verdict}",
            f"Step{'s' * (len(replays) > 1)} {steps}. {worst['evidence']}",
            ADVICE[verdict],
        )


def _number(value: Any) -> float:
    """Return the ratio, or infinity for a norm that was not finite."""
    return float(value) if isinstance(value, (int, float)) else float("inf")
