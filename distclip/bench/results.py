"""Hold the results of a case, and convert them to JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .counters import Counts
from .timing import Sample, median_ratio, median_seconds

__all__ = ["Outcome", "Standing", "merge"]


@dataclass(frozen=True)
class Standing:
    """Result of one competitor in a case.

    Args:
        name: name of the competitor.
        own: whether it is distclip.
        samples: one sample per round. Empty if the competitor failed.
        counts: counts of other costs, if they were counted.
        error: error that excluded the competitor.
    """

    name: str
    own: bool
    samples: Sequence[Sample] = ()
    counts: Counts | None = None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of a case.

    Args:
        name: name of the case.
        title: description in one line.
        world: number of ranks, 1 for a local case.
        threads: number of threads of torch on each rank.
        tensors: number of gradients.
        bytes: number of bytes of all gradients on one rank.
        standings: one result per competitor. The first competitor is the baseline.
    """

    name: str
    title: str
    world: int
    threads: int
    tensors: int
    bytes: int
    standings: Sequence[Standing]

    def milliseconds(self, standing: Standing) -> float | None:
        """Return the median time of a competitor, None if it failed."""
        return 1e3 * median_seconds(standing.samples) if standing.samples else None

    def ratio(self, standing: Standing) -> float | None:
        """Return the median ratio of a competitor's time to the baseline's, None if either failed."""
        first = self.standings[0]
        if not standing.samples or not first.samples:
            return None
        return median_ratio(standing.samples, first.samples)

    def rate(self, standing: Standing) -> float | None:
        """Return the gigabytes of gradients per second and rank, None if the competitor failed."""
        return 1e-9 * self.bytes / median_seconds(standing.samples) if standing.samples else None

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON types, with all samples."""
        return {
            "name": self.name,
            "title": self.title,
            "world": self.world,
            "threads": self.threads,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "competitors": [self._competitor(standing) for standing in self.standings],
        }

    def _competitor(self, standing: Standing) -> dict[str, Any]:
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


def merge(ranks: Sequence[Outcome]) -> Outcome:
    """Merge the outcomes of all ranks: the slowest rank of each round, and the largest of each count.

    Args:
        ranks: outcome of the same case on each rank.
    """
    columns = zip(*(rank.standings for rank in ranks), strict=True)
    return replace(ranks[0], standings=[_merge_standings(column) for column in columns])


def _merge_standings(column: Sequence[Standing]) -> Standing:
    rounds = zip(*(standing.samples for standing in column), strict=True)
    samples = [Sample(max(s.seconds for s in one), any(s.preempted for s in one)) for one in rounds]
    counts = [asdict(standing.counts) for standing in column if standing.counts is not None]
    largest: dict[str, Any] = {
        key: max((count[key] for count in counts if count[key] is not None), default=None)
        for key in (counts[0] if counts else {})
    }
    return replace(column[0], samples=samples, counts=Counts(**largest) if counts else None)
