"""What came of a case, and how it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .counters import Counts
from .timing import Sample, median_ratio, median_seconds

__all__ = ["Outcome", "Standing", "merged"]


@dataclass(frozen=True)
class Standing:
    """One contestant of a case.

    Args:
        name: of the contestant.
        own: whether it is distclip.
        samples: one per round; none, if it failed.
        counts: what else it costs, where that was counted.
        error: why it takes no part.
    """

    name: str
    own: bool
    samples: Sequence[Sample] = ()
    counts: Counts | None = None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A case as it went.

    Args:
        name: of the case.
        title: what is in it, in one line.
        world: how many ranks; 1 for a local case.
        threads: of torch, on each rank.
        tensors: how many gradients.
        bytes: of gradients, on one rank.
        standings: the first one is what the others are compared with.
    """

    name: str
    title: str
    world: int
    threads: int
    tensors: int
    bytes: int
    standings: Sequence[Standing]

    def milliseconds(self, standing: Standing) -> float | None:
        """The median of a contestant; None if it failed."""
        return 1e3 * median_seconds(standing.samples) if standing.samples else None

    def ratio(self, standing: Standing) -> float | None:
        """The median over rounds of its time as a multiple of the first contestant's; None if either failed."""
        first = self.standings[0]
        if not standing.samples or not first.samples:
            return None
        return median_ratio(standing.samples, first.samples)

    def rate(self, standing: Standing) -> float | None:
        """Gigabytes of gradient per second and rank."""
        return 1e-9 * self.bytes / median_seconds(standing.samples) if standing.samples else None

    def as_json(self) -> dict[str, Any]:
        """Everything, with all samples, in what JSON has."""
        return {
            "name": self.name,
            "title": self.title,
            "world": self.world,
            "threads": self.threads,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "contestants": [self._contestant(standing) for standing in self.standings],
        }

    def _contestant(self, standing: Standing) -> dict[str, Any]:
        return {
            "name": standing.name,
            "own": standing.own,
            "error": standing.error,
            "median_ms": self.milliseconds(standing),
            "ratio": self.ratio(standing),
            "gb_per_s": self.rate(standing),
            "counts": None if standing.counts is None else asdict(standing.counts),
            "samples_ms": [1e3 * sample.seconds for sample in standing.samples],
            "preempted": [sample.preempted for sample in standing.samples],
        }


def merged(ranks: Sequence[Outcome]) -> Outcome:
    """One outcome of those of all ranks: of every round the slowest rank, of every count the largest.

    Args:
        ranks: the outcome of the same case on each rank.
    """
    columns = zip(*(rank.standings for rank in ranks), strict=True)
    return replace(ranks[0], standings=[_standing(column) for column in columns])


def _standing(column: Sequence[Standing]) -> Standing:
    rounds = zip(*(standing.samples for standing in column), strict=True)
    samples = [Sample(max(s.seconds for s in each), any(s.preempted for s in each)) for each in rounds]
    counts = [asdict(standing.counts) for standing in column if standing.counts is not None]
    most: dict[str, Any] = {
        key: max((each[key] for each in counts if each[key] is not None), default=None)
        for key in (counts[0] if counts else {})
    }
    return replace(column[0], samples=samples, counts=Counts(**most) if counts else None)
