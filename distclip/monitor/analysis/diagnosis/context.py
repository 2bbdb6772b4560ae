"""Define the input and the output of the rules of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..blame import Blame, blame
from ..change_points import Regimes, find_regimes
from ..log import Log
from ..outcome import MIN_STEPS, Outcome, find_outcome
from ..spikes import SPIKE_FACTOR, find_spikes

__all__ = ["MIN_STEPS", "START", "WARNING_STEPS", "Context", "Finding"]

START = 0.10
"""Share of a run that counts as its start."""

WARNING_STEPS = 10
"""Number of steps before a non-finite step in which a spike counts as its warning."""


RISE = 10.0
"""Minimum factor by which norms rise in `WARNING_STEPS` steps to count as a warning of a non-finite step."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a run.

    Args:
        rule: "replay", "hardware", "bad data", "numerics", "old moments", "divergence", "warm-up", "clip rate" or
            "dominant tensor".
        title: the problem in a few words.
        evidence: the numbers that show it.
        advice: the remedy.
        command: command at the end of the advice; empty if it has none. It must not be wrapped.
    """

    rule: str
    title: str
    evidence: str
    advice: str
    command: str = ""


class Context:
    """A log, and the analyses of it that several rules share.

    Args:
        log: log of the run.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.findings: list[Finding] = []
        """Findings of the rules so far."""

    @cached_property
    def outcome(self) -> Outcome:
        """Verdict on the end of the run."""
        return find_outcome(self.log)

    @property
    def is_fp16(self) -> bool:
        """True if the run computed in float16."""
        precision = str(self.log.header.get("precision", "")).lower()
        # Without a stated precision, a loss scale indicates fp16.
        return "scale" in self.log.columns if not precision else "bf" not in precision and "16" in precision

    @cached_property
    def regimes(self) -> Regimes:
        """Levels of the norms."""
        return find_regimes(self.log)

    @cached_property
    def spikes(self) -> NDArray[np.int64]:
        """Indices of the spikes."""
        return find_spikes(self.log.norms)

    @cached_property
    def blame(self) -> Blame:
        """Properties that the spikes have in common."""
        return blame(self.log)

    @cached_property
    def nonfinite_starts(self) -> NDArray[np.int64]:
        """Indices of the non-finite steps that follow a finite one."""
        nonfinite = ~self.log.finite
        return np.flatnonzero(nonfinite & ~np.concatenate([[False], nonfinite[:-1]]))

    def has_spike_before(self, index: int) -> bool:
        """Return whether a spike, a steep rise of the norms or high losses come shortly before this step."""
        before = self.log.norms[:index]
        before, recent = (part[np.isfinite(part) & (part > 0)] for part in (before, before[-WARNING_STEPS:]))
        rises = len(recent) > 1 and recent[-1] >= RISE * recent.min()
        # Norms that have been high for longer are not spikes compared with the norms around them.
        rises |= len(recent) > 1 and float(np.median(recent)) >= SPIKE_FACTOR * float(np.median(before))
        losses = self.log.columns.get("loss", before[:0])[max(0, index - WARNING_STEPS) : index]
        losses = losses[np.isfinite(losses)]
        rises |= len(losses) > 1 and float(np.median(losses)) > 1.1 * self.outcome.start
        return bool(rises or np.any((self.spikes < index) & (self.spikes >= index - WARNING_STEPS)))
