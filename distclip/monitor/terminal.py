"""Print the results of the commands: tables, sentences, and lines to copy."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._console import WIDTH, Screen, cell
from .analysis.blame import Blame
from .analysis.diagnosis import Finding, find_outcome
from .analysis.formatting import format_list, format_percent, pluralize
from .analysis.log import Log
from .analysis.suggest import Candidate, Suggestion

__all__ = ["Terminal"]

OUTCOME_STYLES = {"diverged": "red", "recovered": "yellow", "healthy": "green", "unknown": ""}
"""Style of the line about the outcome of a run, by verdict."""

MAX_SUSPECTS = 10
"""Maximum number of suspects in a table."""


class Terminal(Screen):
    """The output of the commands: see `Screen`. Sentences are at most 120 characters wide."""

    def sentence(self, text: str, style: str = "", first: str = "", indent: str = "") -> None:
        """Print text that is wrapped between words. A path is never broken.

        Args:
            text: text to print.
            style: style in the syntax of rich.
            first: prefix of the first line.
            indent: prefix of the other lines.
        """
        width = min(self.console.width, WIDTH)
        for line in textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ):
            self.line(line, style)

    def suggestion(self, log: Log, suggestion: Suggestion) -> None:
        """Print the suggested bound, the effect of each candidate, and the code that applies the bound."""
        self.line(log.name, "bold")
        self.sentence(suggestion.text)
        self.console.print(_candidate_table(suggestion))
        if suggestion.current is not None:
            self.sentence(_describe_current(suggestion.current))
        for note in suggestion.notes:
            self.sentence(note)
        self._unknown(log, "")
        for caution in suggestion.cautions:
            self.sentence(caution, "yellow", "Caution: ", "  ")
        self.line()
        if suggestion.cap is not None:
            self.line("Use an adaptive policy, with a cap that always applies:")
        if log.is_launched:
            self.line(f"  python launch/train.py {suggestion.override}", "bold")
        self.line(f"  {suggestion.python}", "bold")

    def diagnosis(self, logs: Sequence[tuple[Log, Sequence[Finding]]]) -> None:
        """Print the findings of each run with their evidence."""
        for i, (log, findings) in enumerate(logs):
            if i:
                self.line()
            self.line(f"{log.name}: {_describe_steps(log)}", "bold")
            outcome = find_outcome(log)
            self.sentence(outcome.text, OUTCOME_STYLES[outcome.verdict], f"  {outcome.verdict}: ", "    ")
            for finding in findings:
                self.line(f"  {finding.title}  [{finding.rule}]", "red")
                self.sentence(finding.evidence, "", "    ", "    ")
                self.sentence(finding.advice.removesuffix(finding.command), "", "    → ", "      ")
                if finding.command:
                    self.line(f"      {finding.command}", "bold")
            if not findings:
                self.line("  no findings")
            self._unknown(log)

    def blame(self, log: Log, blame: Blame) -> None:
        """Print the properties that the spikes have in common, and the next step."""
        self.line(log.name, "bold")
        self.sentence(blame.text)
        self._unknown(log, "")
        if blame.suspects:
            self.console.print(_suspect_table(blame))
        for kind, counts in (("rank", blame.ranks), ("tensor", blame.tensors)):
            if counts:
                spikes = pluralize(len(blame.spikes), "spike")
                text = format_list([f"{name} ({count})" for name, count in counts])
                self.sentence(f"Largest part of the gradient by {kind}, in {spikes}: {text}.", indent="  ")
        if blame.worst is not None:
            worst = blame.worst
            size = "not finite" if math.isnan(worst.norm) else f"norm {worst.norm:.3g}, {worst.ratio:.3g} x the median"
            ids = f", samples {format_list(worst.ids, 8)}" if worst.ids else ""
            self.sentence(f"Worst spike: step {worst.step} ({size}){ids}. {blame.how_to_replay}", indent="  ")
            if blame.replay is not None:
                self.line(f"  {blame.replay}", "bold")
            if blame.culprits:
                names = format_list([str(culprit) for culprit in blame.culprits], 8)
                self.sentence(f"Not finite there: {names}.", indent="  ")

    def _unknown(self, log: Log, indent: str = "  ") -> None:
        """Print which numbers the log of another tool does not have."""
        for sentence in log.unknown:
            self.sentence(sentence, "dim", indent, indent)


def _candidate_table(suggestion: Suggestion) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("bound")
    for title in ("norm", "clipped", "mean coef", "longest streak"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("role")
    candidates = suggestion.candidates + (() if suggestion.current is None else (suggestion.current,))
    for candidate in candidates:
        table.add_row(
            cell(candidate.name),
            "varies" if math.isnan(candidate.bound) else f"{candidate.bound:.3g}",
            format_percent(candidate.clip_rate),
            f"{candidate.mean_coef:.3f}",
            str(candidate.longest_streak),
            candidate.role,
            style="bold" if candidate.name == "p90" else None,
        )
    return table


def _describe_current(current: Candidate) -> str:
    subject = "The policy in use" if math.isnan(current.bound) else f"The bound {current.name}, {current.bound:.3g},"
    role = "inactive" if current.role == "inactive" else f"a {current.role}"
    text = f"{subject} is {role}: it clips {format_percent(current.clip_rate)} of these steps."
    if current.role == "normaliser":
        text += " With SGD, bound and learning rate then have the same effect. With Adam, the bound has little effect."
    return text


def _suspect_table(blame: Blame) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("sample")
    for title in ("in spikes", "expected by chance", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    for suspect in blame.suspects[:MAX_SUSPECTS]:
        table.add_row(
            cell(suspect.id),
            f"{suspect.count} of {blame.num_with_ids}",
            f"{suspect.expected:.1f}",
            f"{suspect.chance:.0e}",
        )
    if len(blame.suspects) > MAX_SUSPECTS:
        table.add_row(f"and {len(blame.suspects) - MAX_SUSPECTS} more")
    return table


def _describe_steps(log: Log) -> str:
    num_nonfinite = int((~log.finite).sum())
    clipped = "" if log.unknown else f", {format_percent(log.clip_rate)} clipped"
    nonfinite = f", {num_nonfinite:,} not finite" if num_nonfinite else ""
    return f"{pluralize(len(log.steps), 'step')}{clipped}{nonfinite}"
