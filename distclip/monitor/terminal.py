"""What the commands show: tables, and lines that may be copied."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._console import WIDTH, Screen
from .analysis.blame import Blame
from .analysis.candidates import Candidate
from .analysis.diagnosis import Finding
from .analysis.log import Log
from .analysis.phrases import listed, percent
from .analysis.threshold import Suggestion

__all__ = ["Terminal"]


class Terminal(Screen):
    """Where everything is shown: see `Screen`. Sentences are no wider than a pipe on a wide screen either."""

    def sentence(self, text: str, style: str = "", first: str = "", indent: str = "") -> None:
        """Text that is read: folded between words, but a path is not torn."""
        width = min(self.console.width, WIDTH)
        folded = textwrap.fill(
            text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        self.line(folded, style)

    def suggestion(self, log: Log, found: Suggestion) -> None:
        """A bound, what each would do, and how to write it."""
        self.line(log.name, "bold")
        self.sentence(found.text)
        self.console.print(_candidates(found))
        if found.current is not None:
            self.sentence(_standing(found))
        for note in found.notes:
            self.sentence(note)
        for caution in found.cautions:
            self.sentence(caution, "yellow", "Mind: ", "  ")
        self.line()
        if found.cap is not None:
            self.line("Adaptive, with a cap that always holds:")
        self.line(f"  launch/train.py {found.override}", "bold")
        self.line(f"  {found.python}", "bold")

    def diagnosis(self, logs: Sequence[tuple[Log, Sequence[Finding]]]) -> None:
        """What is wrong with each run, with its evidence."""
        for number, (log, findings) in enumerate(logs):
            if number:
                self.line()
            self.line(f"{log.name}: {_steps(log)}", "bold")
            for finding in findings:
                self.line(f"  {finding.title}  [{finding.rule}]", "red")
                self.sentence(finding.evidence, "", "    ", "    ")
                self.sentence(finding.advice.removesuffix(finding.command), "", "    → ", "      ")
                if finding.command:
                    self.line(f"      {finding.command}", "bold")
            if not findings:
                self.line("  nothing stands out", "green")

    def blame(self, log: Log, found: Blame) -> None:
        """What the spikes have in common, and what to do next."""
        self.line(log.name, "bold")
        self.sentence(found.text)
        if found.suspects:
            self.console.print(_suspects(found))
        for what, places in (("rank", found.ranks), ("tensor", found.tensors)):
            if places:
                of = f"{len(found.spikes)} spike{'s' * (len(found.spikes) > 1)}"
                most = listed([f"{name} ({count})" for name, count in places])
                self.sentence(f"Largest part of the gradient, by {what}, in {of}: {most}.", indent="  ")
        if found.worst is not None:
            worst = found.worst
            size = "not finite" if math.isnan(worst.norm) else f"norm {worst.norm:.3g}, {worst.ratio:.3g} x the median"
            ids = f", samples {listed(worst.ids, 8)}" if worst.ids else ""
            self.sentence(f"Worst: step {worst.step} ({size}){ids}. To compute its gradient once more:", indent="  ")
            self.line(f"  {found.replay}", "bold")


def _candidates(found: Suggestion) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("bound")
    for title in ("norm", "clipped", "mean coef", "longest streak"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("then it is")
    rows: Iterable[Candidate] = (*found.candidates, *(() if found.current is None else (found.current,)))
    for each in rows:
        table.add_row(
            each.name,
            "varies" if math.isnan(each.bound) else f"{each.bound:.3g}",
            percent(each.clip_rate),
            f"{each.mean_coef:.3f}",
            str(each.longest),
            each.role,
            style="bold" if each.name == "p90" else None,
        )
    return table


def _standing(found: Suggestion) -> str:
    current = found.current
    assert current is not None
    bound = "The policy in use" if math.isnan(current.bound) else f"The bound {current.name}, {current.bound:.3g},"
    text = f"{bound} is {'inactive' if current.role == 'inactive' else f'a {current.role}'}: it clips "
    text += f"{percent(current.clip_rate)} of these steps."
    if current.role == "normaliser":
        text += " With SGD, bound and learning rate are then one knob; with Adam the bound hardly matters."
    return text


def _suspects(found: Blame) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("sample")
    for title in ("spikes with it", "by chance", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in found.suspects[:10]:
        table.add_row(str(each.id), f"{each.count} of {found.with_ids}", f"{each.expected:.1f}", f"{each.chance:.0e}")
    if len(found.suspects) > 10:
        table.add_row(f"and {len(found.suspects) - 10} more")
    return table


def _steps(log: Log) -> str:
    count = f"{len(log.steps):,} step{'s' * (len(log.steps) > 1)}"
    broken = int((~log.finite).sum())
    return f"{count}, {percent(float(log.clipped.mean()))} clipped{f', {broken:,} not finite' if broken else ''}"
