"""Gradients that are not finite: who is to blame, what to say, and when to give up.

The decision itself needs nothing of this: that something is not finite is in the totals, which all ranks have alike.
Names and counts are looked for on such a step only.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ..comm import Comm, global_ranks
from ..errors import FrequentClippingWarning, NonFiniteError, NonFiniteWarning, TooManySkippedSteps
from ..norms.measure import Evidence
from ..sharding.shard import Shard, stored_values

__all__ = [
    "Culprit",
    "Incident",
    "OnNonFinite",
    "SkipCounter",
    "blame",
    "counted",
    "described",
    "suspect_nonfinite",
    "zero_",
]

OnNonFinite: TypeAlias = Literal["raise", "skip", "zero", "propagate"]
"""What to do with a step whose gradients are not finite."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """A gradient with elements that are not finite.

    Args:
        name: of the parameter.
        nans: how many NaN, on all `ranks` together.
        infs: how many infinite ones.
        ranks: that hold them, as torch.distributed or MPI counts; empty for a process that clips alone.
    """

    name: str
    nans: int
    infs: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        counts = [f"{n} {kind}" for n, kind in ((self.nans, "NaN"), (self.infs, "Inf")) if n]
        on = f" on rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.name} ({' and '.join(counts)}{on})"


@dataclass(frozen=True, slots=True)
class Incident:
    """One step whose gradients were not finite.

    Args:
        step: the how-manieth call of the clipper it was, from 1.
        action: what was done about it.
        culprits: whose they were; empty where every element is finite and their norm is not.
    """

    step: int
    action: str
    culprits: tuple[Culprit, ...]


def counted(shards: Iterable[Shard]) -> list[tuple[str, int, int]]:
    """(name, NaN, Inf) of this rank's gradients that have any. Host syncs: one per gradient."""
    found = []
    for shard in shards:
        values = stored_values(shard.grad)
        nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
        if nans or infs:
            found.append((shard.name, nans, infs))
    return found


def suspect_nonfinite(each: Iterable[Evidence]) -> list[tuple[str, int, int]]:
    """The same from the sums of powers alone, when the gradients are gone: at least one of its kind."""
    found = []
    for names, powers in each:
        rows = powers.view(len(names), -1)
        counts = torch.stack([rows.isnan().any(1), rows.isinf().any(1)], dim=1).tolist()
        found += [(name, int(nan), int(inf)) for name, (nan, inf) in zip(names, counts, strict=True) if nan or inf]
    return found


def blame(found: list[tuple[str, int, int]], comm: Comm) -> tuple[Culprit, ...]:
    """What all ranks found. Collectives: one gather over `comm`."""
    culprits: dict[str, Culprit] = {}
    told_by = comm.gather_objects(found)
    ranks = global_ranks(comm) if comm.size > 1 else (None,)
    for rank, told in zip(ranks, told_by, strict=True):
        for name, nans, infs in told:
            old = culprits.get(name, Culprit(name, 0, 0, ()))
            culprits[name] = Culprit(
                name, old.nans + nans, old.infs + infs, (*old.ranks, *(() if rank is None else (rank,)))
            )
    return tuple(culprits.values())


def described(culprits: Sequence[Culprit]) -> str:
    """What is wrong with the gradients, in words: an element, or only the norm."""
    if not culprits:
        return (
            "the norm overflowed: every element is finite, but the sum of their powers is beyond float64 (take a "
            "smaller norm_type, or inf)"
        )
    more = f" and {len(culprits) - 5} more" if len(culprits) > 5 else ""
    return f"elements are not finite in {', '.join(map(str, culprits[:5]))}{more}"


def zero_(shards: Iterable[Shard]) -> None:
    """Replace the elements that are not finite by 0, and leave all others."""
    for shard in shards:
        values = stored_values(shard.grad)
        values.masked_fill_(~values.isfinite(), 0)


class SkipCounter:
    """Counts what was not finite, says so, and gives up, on every rank at the same step.

    Args:
        max_skips: how many steps in a row may be skipped before it raises; None for any number.
    """

    def __init__(self, max_skips: int | None) -> None:
        self.max_skips = max_skips
        self.steps = self.skipped = self.in_a_row = self.restarts = 0
        self.incidents: deque[Incident] = deque(maxlen=100)
        self._clipped: deque[float] = deque(maxlen=128)
        self._warned = False

    def refuse(self, step: int, culprits: tuple[Culprit, ...]) -> None:
        """Raise for a step: `on_nonfinite="raise"`."""
        self.incidents.append(Incident(step, "raise", culprits))
        raise NonFiniteError(
            f"step {step}: {described(culprits)}. No gradient was changed. "
            'Write on_nonfinite="skip" to leave such steps out.'
        )

    def zeroed(self, step: int, culprits: tuple[Culprit, ...]) -> None:
        """Say that elements were set to zero."""
        self.incidents.append(Incident(step, "zero", culprits))
        warnings.warn(f"step {step}: {described(culprits)}; they were set to zero.", NonFiniteWarning, stacklevel=5)

    def skip(self, step: int, culprits: tuple[Culprit, ...], quiet: bool) -> None:
        """Count a skipped step and say so; with a loss scale it is the usual way to find one, and only counted.

        Raises:
            TooManySkippedSteps: it is the last of too many in a row.
        """
        self.incidents.append(Incident(step, "skip", culprits))
        self.skipped += 1
        self.in_a_row += 1
        if self.max_skips is not None and self.in_a_row >= self.max_skips:
            raise TooManySkippedSteps(
                f"step {step}: {self.in_a_row} steps in a row were skipped (max_skips={self.max_skips}): "
                f"{described(culprits)}. Parameters and optimizer are as they were before the first of them."
            )
        if not quiet:
            text = f"step {step} was skipped ({self.skipped} in all): {described(culprits)}."
            warnings.warn(text, NonFiniteWarning, stacklevel=5)

    def leave_out(self, step: int) -> None:
        """Count a step that the policy left out.

        Raises:
            TooManySkippedSteps: it is the last of too many in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        if self.max_skips is not None and self.in_a_row >= self.max_skips:
            raise TooManySkippedSteps(
                f"step {step}: {self.in_a_row} steps in a row were skipped (max_skips={self.max_skips}), this one by "
                "the policy: its norm is finite and beyond the bound."
            )

    def went_well(self, clipped: float, restarts: int) -> None:
        """Take note of a step that was finite.

        Args:
            clipped: which part of the slots was clipped, for a policy that adapts.
            reseeds: how often the policy started anew so far.
        """
        self._clipped.append(clipped)
        often = len(self._clipped) == 128 and sum(self._clipped) > 64
        if (often or restarts > self.restarts) and not self._warned:
            self._warned = True
            warnings.warn(
                f"step {self.steps}: the policy has clipped more than half of the last steps"
                f"{' and started anew from their norms before clipping' if restarts > self.restarts else ''}. Clipping "
                "that often is a smaller learning rate under another name: lower the rate, or raise the bound.",
                FrequentClippingWarning,
                stacklevel=5,
            )
        self.restarts = restarts
