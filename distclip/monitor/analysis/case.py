"""What a rule looks at, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .blame import Blame, blame
from .excess import spikes_of
from .log import Log
from .regimes import Regimes, find_regimes

__all__ = ["BEFORE", "FIRST", "Case", "Finding"]

FIRST = 0.10
"""Of the run: its first steps."""

BEFORE = 10
"""Steps before one that is not finite, in which a spike would have announced it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Args:
        rule: its name: "clip rate", "warm-up", "bad data", "numerics", "divergence", "dominant tensor".
        title: in a few words.
        evidence: the numbers it rests on.
        advice: what to do about it.
        command: with which the advice ends, if it does: to be copied, so not to be folded.
    """

    rule: str
    title: str
    evidence: str
    advice: str
    command: str = ""


class Case:
    """A log, and what more than one rule asks about it."""

    def __init__(self, log: Log) -> None:
        self.log = log

    @cached_property
    def regimes(self) -> Regimes:
        return find_regimes(self.log)

    @cached_property
    def spikes(self) -> NDArray[np.int64]:
        """Indices of the steps that stand out."""
        return spikes_of(self.log)

    @cached_property
    def blame(self) -> Blame:
        return blame(self.log)

    @cached_property
    def broken(self) -> NDArray[np.int64]:
        """Indices of the steps that are not finite, of those in a row the first."""
        bad = ~self.log.finite
        return np.flatnonzero(bad & ~np.concatenate([[False], bad[:-1]]))

    def announced(self, index: int) -> bool:
        """Whether a spike came shortly before a step."""
        return bool(np.any((self.spikes < index) & (self.spikes >= index - BEFORE)))
