"""What the analysis has to say of each run, or why it has nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.diagnosis import Finding, diagnose
from ..analysis.errors import RunError
from ..analysis.log import Log
from ..analysis.threshold import suggest
from .words import NOTHING, short

__all__ = ["Remark", "Verdict", "remarks", "verdicts"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one run.

    Args:
        findings: of the diagnosis.
        bound: the one to take, in a few characters.
        text: the same in a sentence, or why there is none.
        cautions: what makes it doubtful, a sentence each.
        code: what to write to have it, in Hydra and in Python; nothing if there is none.
    """

    findings: tuple[Finding, ...]
    bound: str
    text: str
    cautions: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Remark:
    """One finding, of all runs that have it.

    Args:
        title: in a few words.
        cases: (run, evidence) of each.
        advice: what to do about it, each different one once.
    """

    title: str
    cases: tuple[tuple[int, str], ...]
    advice: tuple[str, ...]


def verdicts(logs: Sequence[Log]) -> list[Verdict]:
    """On each."""
    return [_verdict(log) for log in logs]


def remarks(each: Sequence[Verdict]) -> list[Remark]:
    """The findings of all runs, those that are alike together."""
    titles = list(dict.fromkeys(finding.title for verdict in each for finding in verdict.findings))
    found = []
    for title in titles:
        cases = [
            (run, finding) for run, verdict in enumerate(each) for finding in verdict.findings if finding.title == title
        ]
        advice = tuple(dict.fromkeys(finding.advice for _, finding in cases))
        found.append(Remark(title, tuple((run, finding.evidence) for run, finding in cases), advice))
    return found


def _verdict(log: Log) -> Verdict:
    findings = tuple(diagnose(log))
    try:
        found = suggest(log)
    except RunError as error:
        return Verdict(findings, NOTHING, str(error).removeprefix(f"{log.name}: "))
    bound = f"{short(found.max_norm)} ({short(found.low)} … {short(found.high)})"
    return Verdict(findings, bound, found.text, found.cautions, (found.override, found.python))
