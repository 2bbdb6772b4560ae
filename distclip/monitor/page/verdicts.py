"""What the analysis has to say of each run, or why it has nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.diagnosis import Finding, diagnose
from ..analysis.errors import RunError
from ..analysis.log import Log
from ..analysis.threshold import suggest
from .words import NOTHING, short

__all__ = ["Verdict", "verdicts"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one run.

    Args:
        findings: of the diagnosis.
        bound: the one to take, in a few characters.
        text: the same in a sentence, or why there is none.
    """

    findings: tuple[Finding, ...]
    bound: str
    text: str


def verdicts(logs: Sequence[Log]) -> list[Verdict]:
    """On each."""
    return [_verdict(log) for log in logs]


def _verdict(log: Log) -> Verdict:
    try:
        suggestion = suggest(log)
        bound = f"{short(suggestion.max_norm)} ({short(suggestion.low)} … {short(suggestion.high)})"
        text = suggestion.text
    except RunError as error:
        bound, text = NOTHING, str(error)
    return Verdict(tuple(diagnose(log)), bound, text)
