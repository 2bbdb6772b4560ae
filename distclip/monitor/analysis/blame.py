"""Which samples, ranks and tensors the spikes of a run have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .excess import SPIKE, spikes_of
from .log import Log, Spike
from .phrases import listed

__all__ = ["Blame", "Suspect", "blame"]

CHANCE = 0.01
"""That any sample would be among the spikes so often, if spikes did not care about samples."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample.

    Args:
        id: as the run named it.
        count: of the spikes in whose batches it was.
        expected: how many that would be by chance.
        chance: that any of the samples would have as many.
    """

    id: int | str
    count: int
    expected: float
    chance: float


@dataclass(frozen=True)
class Blame:
    """What the spikes of a run have in common.

    Args:
        spikes: that were looked at, in order of steps.
        with_ids: how many of them say which samples they had.
        suspects: samples that are there more often than chance allows, the most frequent first.
        most: the most frequent sample of all, suspect or not; None where no ids were recorded.
        ranks, tensors: where the largest part of the gradient was, with how many spikes that holds for.
        worst: the spike to look at first.
        replay: the command that computes its gradient once more.
        text: what was found, in a sentence or two.
    """

    spikes: tuple[Spike, ...]
    with_ids: int
    suspects: tuple[Suspect, ...]
    most: Suspect | None
    ranks: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[str, int], ...]
    worst: Spike | None
    replay: str | None
    text: str


def blame(log: Log) -> Blame:
    """Count what the spikes have in common.

    A spike is a recorded step with at least three times the median norm before it, or one whose norm is not finite; of
    such steps in a row, as a network that is beyond repair has them, the first. The chance is a binomial one: of N
    samples a batch of b has any given one with b/N. N is the run's "dataset_size", if its header has that, or as
    many as are named in the recorded steps, which are fewer, so that the chance comes out too large rather than too
    small; it is multiplied by N, because any of them might have been the one.
    """
    spikes = _spiky(log)
    with_ids = [spike.ids for spike in spikes if spike.ids]
    everyone = _population(log)
    ranked = _ranked(with_ids, everyone)
    suspects = tuple(each for each in ranked if each.count > 1 and each.chance < CHANCE)
    with_it = [spike for spike in spikes if suspects and suspects[0].id in spike.ids] or spikes
    worst = max(with_it, key=lambda spike: math.inf if math.isnan(spike.ratio) else spike.ratio, default=None)
    return Blame(
        spikes=tuple(spikes),
        with_ids=len(with_ids),
        suspects=suspects,
        most=ranked[0] if ranked else None,
        ranks=tuple(Counter(spike.rank for spike in spikes if spike.rank is not None).most_common()),
        tensors=tuple(Counter(spike.tensor for spike in spikes if spike.tensor is not None).most_common()),
        worst=worst,
        replay=None if worst is None else f"launch/train.py resume={log.path.parent} replay={worst.step}",
        text=_text(log, spikes, len(with_ids), suspects, ranked, everyone),
    )


def _spiky(log: Log) -> list[Spike]:
    # Where each step stands in the log, and whether the one before it was not finite either.
    place = np.searchsorted(log.steps, [spike.step for spike in log.spikes])
    follows = {int(i) for i in place if i > 0 and not log.finite[i] and not log.finite[i - 1]}
    return [
        spike
        for spike, i in zip(log.spikes, place.tolist(), strict=True)
        if (spike.ratio >= SPIKE or math.isnan(spike.norm)) and i not in follows
    ]


def _population(log: Log) -> int:
    told = log.header.get("dataset_size")
    named = len({each for spike in log.spikes for each in spike.ids})
    return max(named, told) if isinstance(told, int) else named


def _ranked(batches: Sequence[Iterable[int | str]], everyone: int) -> list[Suspect]:
    """All samples of the batches, the most frequent first."""
    samples = [frozenset(batch) for batch in batches]
    counts = Counter(each for batch in samples for each in batch)
    # The mean chance: with batches of different sizes the number of hits scatters a little less than binomially.
    rate = sum(map(len, samples)) / (len(samples) * everyone) if samples else 0.0
    chances = {count: min(1.0, everyone * _at_least(count, len(samples), rate)) for count in set(counts.values())}
    return [Suspect(each, count, rate * len(samples), chances[count]) for each, count in counts.most_common()]


def _at_least(count: int, trials: int, rate: float) -> float:
    """The binomial probability of so many hits or more."""
    if rate >= 1:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1)
        + hits * math.log(rate) + (trials - hits) * math.log1p(-rate)
        for hits in range(count, trials + 1)
    ]  # fmt: skip
    return sum(map(math.exp, logs))


def _text(
    log: Log,
    spikes: Sequence[Spike],
    with_ids: int,
    suspects: Sequence[Suspect],
    ranked: Sequence[Suspect],
    everyone: int,
) -> str:
    unseen = np.count_nonzero(~log.finite) + len(spikes_of(log))
    if unseen and not log.spikes:
        return (
            f"{unseen:,} of {len(log.steps):,} steps stand out, and the log says nothing more of them: record the run "
            "with distclip.monitor.Recorder, and call recorder.note(ids=...) with the batch's samples after each step."
        )
    if not spikes:
        return (
            f"None of {len(log.steps):,} steps was recorded with {SPIKE:g} times the median norm before it, or with a "
            "norm that is not finite: there is nobody to blame."
        )
    if not with_ids:
        return (
            f"{_spikes(len(spikes))}, and no sample ids were recorded with {'them' if len(spikes) > 1 else 'it'}: call "
            "recorder.note(ids=...) with those of the batch after each step."
        )
    of = f"{_spikes(with_ids)} with sample ids"
    if not suspects:
        most = ranked[0]
        return (
            f"{of}, and no sample is in more of them than chance would have it: the most frequent, {most.id}, is in "
            f"{most.count}, and of {everyone:,} samples one may well be."
        )
    first = suspects[0]
    alike = [each for each in suspects if each.count == first.count]
    if len(alike) > 1:
        who = f"samples {listed([each.id for each in alike], 8)} are each in {first.count}"
        cannot = " They come together: which of them it is the log cannot tell."
    else:
        who, cannot = f"sample {first.id} is in {first.count}", ""
    return f"{of}: {who} of them, where chance has {first.expected:.1f} (p = {first.chance:.0e}).{cannot}"


def _spikes(count: int) -> str:
    return f"{count:,} spike{'s' * (count > 1)}"
