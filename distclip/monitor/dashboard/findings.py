"""Assess runs: collect the findings and the suggested bound of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.diagnosis import Finding, Outcome, diagnose, find_outcome
from ..analysis.errors import RunError
from ..analysis.formatting import MISSING, format_number, format_percent
from ..analysis.log import Log
from ..analysis.suggest import suggest

__all__ = ["Assessment", "SharedFinding", "assess", "group_findings"]


@dataclass(frozen=True, slots=True)
class Assessment:
    """The analysis of one run.

    Args:
        outcome: verdict on the end of the run.
        findings: findings of the diagnosis.
        clip_rate: share of the clipped steps as text.
        bound: the suggested bound in a few characters.
        text: the suggestion in a sentence, or the reason why there is none.
        cautions: reasons to doubt the bound, one sentence each.
        code: code that applies the bound, in Hydra and in Python; empty without a bound.
    """

    outcome: Outcome
    findings: tuple[Finding, ...]
    clip_rate: str
    bound: str
    text: str
    cautions: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SharedFinding:
    """A finding, and all runs that have it.

    Args:
        title: the problem in a few words.
        evidence: (index of the run, evidence) of each run.
        advice: every different remedy once.
    """

    title: str
    evidence: tuple[tuple[int, str], ...]
    advice: tuple[str, ...]


def assess(logs: Sequence[Log]) -> list[Assessment]:
    """Return the findings and the suggested bound of each run."""
    return [_assess_run(log) for log in logs]


def group_findings(assessments: Sequence[Assessment]) -> list[SharedFinding]:
    """Group the findings of all runs by title."""
    groups: dict[str, list[tuple[int, Finding]]] = {}
    for run, assessment in enumerate(assessments):
        for finding in assessment.findings:
            groups.setdefault(finding.title, []).append((run, finding))
    return [
        SharedFinding(
            title,
            tuple((run, finding.evidence) for run, finding in group),
            tuple(dict.fromkeys(finding.advice for _, finding in group)),
        )
        for title, group in groups.items()
    ]


def _assess_run(log: Log) -> Assessment:
    outcome, findings = find_outcome(log), tuple(diagnose(log))
    clip_rate = format_percent(log.clip_rate)
    try:
        suggestion = suggest(log)
    except RunError as error:
        reason = str(error).removeprefix(f"{log.name}: ")
        return Assessment(
            outcome, findings, clip_rate, MISSING, reason[:1].upper() + reason[1:] + "." * (not reason.endswith("."))
        )
    low, high = format_number(suggestion.low), format_number(suggestion.high)
    bound = f"{format_number(suggestion.max_norm)} ({low} … {high})"
    code = (f"python launch/train.py {suggestion.override}",) * log.is_launched + (suggestion.python,)
    return Assessment(outcome, findings, clip_rate, bound, suggestion.text, suggestion.cautions, code)
