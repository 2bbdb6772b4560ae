"""Describe the results of the commands as JSON, which `--json` prints. docs/commands.md documents the fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .._version import __version__
from .analysis.blame import Blame, Suspect
from .analysis.diagnosis import Finding, Outcome
from .analysis.log import Log
from .analysis.spikes import Culprit, Spike
from .analysis.suggest import Candidate, Suggestion
from .jsonl import finite

__all__ = ["SCHEMA", "describe_blame", "describe_diagnosis", "describe_run", "describe_suggestion", "format_document"]

SCHEMA = 1
"""Version of the documents. It increases if a field changes its meaning or is removed, and not if one is added."""

Fields = dict[str, Any]


def format_document(command: str, runs: Sequence[Fields], further: Mapping[str, Any]) -> str:
    """Format the result of a command as one JSON object on one line. Numbers that are not finite are null.

    Args:
        command: name of the command.
        runs: result for each run, in the order of the command line.
        further: fields that do not belong to one run.

    >>> format_document("report", [], {"page": "report.html"})[:40]
    '{"schema": 1, "command": "report", "dist'
    """
    document = {"schema": SCHEMA, "command": command, "distclip": __version__, "runs": runs, **further}
    return json.dumps(finite(document), allow_nan=False, default=str)


def describe_diagnosis(log: Log, outcome: Outcome, findings: Sequence[Finding]) -> Fields:
    """Return the outcome of a run and its findings."""
    return {
        **describe_run(log),
        "outcome": {"verdict": outcome.verdict, "text": outcome.text, "loss": outcome.loss, "start": outcome.start},
        "findings": [
            {
                "rule": finding.rule,
                "title": finding.title,
                "evidence": finding.evidence,
                "advice": finding.advice,
                "command": finding.command or None,
            }
            for finding in findings
        ],
    }


def describe_suggestion(log: Log, suggestion: Suggestion) -> Fields:
    """Return the suggested bound of a run and its evidence."""
    segment = suggestion.segment
    return {
        **describe_run(log),
        "max_norm": suggestion.max_norm,
        "low": suggestion.low,
        "high": suggestion.high,
        "interval": suggestion.interval,
        "regime": {"first_step": segment.first, "last_step": segment.last, "steps": suggestion.num_steps},
        "drift": suggestion.drift,
        "cap": suggestion.cap,
        "text": suggestion.text,
        "notes": suggestion.notes,
        "cautions": suggestion.cautions,
        "python": suggestion.python,
        "override": suggestion.override if log.is_launched else None,
        "candidates": [_describe_candidate(candidate) for candidate in suggestion.candidates],
        "current": None if suggestion.current is None else _describe_candidate(suggestion.current),
    }


def describe_blame(log: Log, blame: Blame) -> Fields:
    """Return the properties that the spikes of a run have in common."""
    return {
        **describe_run(log),
        "text": blame.text,
        "spikes": [_describe_spike(spike) for spike in blame.spikes],
        "spikes_with_ids": blame.num_with_ids,
        "suspects": [_describe_suspect(suspect) for suspect in blame.suspects],
        "ranks": [{"rank": rank, "spikes": count} for rank, count in blame.ranks],
        "tensors": [{"tensor": tensor, "spikes": count} for tensor, count in blame.tensors],
        "worst": None if blame.worst is None else _describe_spike(blame.worst),
        "culprits": [_describe_culprit(culprit) for culprit in blame.culprits],
        "replay": blame.replay,
    }


def describe_run(log: Log) -> Fields:
    """Return the fields that all commands have."""
    return {
        "name": log.name,
        "path": log.path,
        "steps": len(log.steps),
        "first_step": int(log.steps[0]),
        "last_step": int(log.steps[-1]),
        "clip_rate": log.clip_rate,
        "nonfinite": int((~log.finite).sum()),
        "skipped": int(log.skipped.sum()),
        "unreadable_lines": log.unreadable,
        "unknown": log.unknown,
    }


def _describe_candidate(candidate: Candidate) -> Fields:
    return {
        "name": candidate.name,
        "bound": candidate.bound,
        "clip_rate": candidate.clip_rate,
        "mean_coef": candidate.mean_coef,
        "longest_streak": candidate.longest_streak,
        "role": candidate.role,
    }


def _describe_spike(spike: Spike) -> Fields:
    return {
        "step": spike.step,
        "norm": spike.norm,
        "ratio": spike.ratio,
        "ids": spike.ids,
        "rank": spike.rank,
        "tensor": spike.tensor,
        "share": spike.share,
    }


def _describe_suspect(suspect: Suspect) -> Fields:
    return {"id": suspect.id, "spikes": suspect.count, "expected": suspect.expected, "chance": suspect.chance}


def _describe_culprit(culprit: Culprit) -> Fields:
    return {"name": culprit.name, "nans": culprit.nans, "infs": culprit.infs, "ranks": culprit.ranks}
