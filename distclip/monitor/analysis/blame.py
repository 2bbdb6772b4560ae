"""Find the samples, ranks and tensors that the spikes of a run have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from shlex import quote

import numpy as np

from .formatting import format_list, pluralize, printable
from .log import Log
from .spikes import SPIKE_FACTOR, Culprit, Spike, find_spikes

__all__ = ["Blame", "Suspect", "blame"]

MAX_CHANCE = 0.01
"""Maximum probability, for a suspect, that any sample is in that many spikes by chance."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample that is in the batches of several spikes.

    Args:
        id: id that the run noted.
        count: number of spikes with the sample in their batches.
        expected: number expected by chance.
        chance: probability that any of the samples is in that many spikes by chance.
    """

    id: int | str
    count: int
    expected: float
    chance: float


@dataclass(frozen=True)
class Blame:
    """Properties that the spikes of a run have in common.

    Args:
        spikes: spikes that were examined, in order of steps.
        num_with_ids: number of spikes with sample ids.
        suspects: samples in more spikes than chance explains, the most frequent first.
        most_frequent: the most frequent sample, suspect or not; None if no ids were recorded.
        ranks: (rank, number of spikes) with the largest part of the gradient on that rank.
        tensors: (tensor, number of spikes) with the largest part of the gradient in that tensor.
        worst: the spike to examine first, preferably one that can be replayed; None if there is no spike.
        replay: command that computes the gradient of this spike again; None if the run has no checkpoint before it, or
            was not made by launch/train.py.
        text: the result in one or two sentences.
        culprits: gradients with non-finite elements at that spike.
    """

    spikes: tuple[Spike, ...]
    num_with_ids: int
    suspects: tuple[Suspect, ...]
    most_frequent: Suspect | None
    ranks: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[str, int], ...]
    worst: Spike | None
    replay: str | None
    text: str
    culprits: tuple[Culprit, ...] = ()

    @property
    def how_to_replay(self) -> str:
        """Instruction to compute the gradient of the worst spike again, which `replay` completes."""
        if self.worst is None:
            return ""
        if self.replay is not None:
            return "To compute its gradient again:"
        return (
            f"To compute its gradient again, load a checkpoint from before step {self.worst.step}, and pass the batch "
            "of that step to the model."
        )


def blame(log: Log) -> Blame:
    """Find the samples, ranks and tensors that the spikes of a run have in common.

    A spike is a recorded step whose norm is at least three times the median before it or is not finite. Among
    consecutive non-finite steps only the first one counts, because a diverged network makes all later steps non-finite.

    The chance is binomial: a batch of b from N samples contains a given sample with probability b/N. N is the run's
    "dataset_size" if the header has it. Otherwise N is the number of different samples in the recorded steps. That
    number is smaller, which overestimates the chance. The probability is multiplied by N because the sample could have
    been any of them.
    """
    spikes = _select_spikes(log)
    batches = [spike.ids for spike in spikes if spike.ids]
    num_samples = _count_samples(log)
    ranking = _rank_samples(batches, num_samples)
    suspects = tuple(sample for sample in ranking if sample.count > 1 and sample.chance < MAX_CHANCE)
    with_suspect = [spike for spike in spikes if suspects and suspects[0].id in spike.ids] or spikes
    replayable = [spike for spike in with_suspect if _replay_command(log, spike.step) is not None]
    worst = max(
        replayable or with_suspect, key=lambda spike: math.inf if math.isnan(spike.ratio) else spike.ratio, default=None
    )
    return Blame(
        spikes=tuple(spikes),
        num_with_ids=len(batches),
        suspects=suspects,
        most_frequent=ranking[0] if ranking else None,
        ranks=tuple(Counter(spike.rank for spike in spikes if spike.rank is not None).most_common()),
        tensors=tuple(Counter(spike.tensor for spike in spikes if spike.tensor is not None).most_common()),
        worst=worst,
        replay=None if worst is None else _replay_command(log, worst.step),
        text=_describe(log, spikes, len(batches), suspects, ranking, num_samples),
        culprits=tuple(culprit for culprit in log.culprits if worst is not None and culprit.step == worst.step),
    )


def _replay_command(log: Log, step: int) -> str | None:
    if not log.is_launched or not any(checkpoint < step for checkpoint in log.checkpoints):
        return None
    return f"python launch/train.py {quote(f'resume={log.path.parent}')} replay={step}"


def _select_spikes(log: Log) -> list[Spike]:
    indices = np.searchsorted(log.steps, [spike.step for spike in log.spikes])
    # A non-finite step right after another one is a consequence of that one.
    consequences = {int(i) for i in indices if i > 0 and not log.finite[i] and not log.finite[i - 1]}
    return [
        spike
        for spike, i in zip(log.spikes, indices.tolist(), strict=True)
        if (spike.ratio >= SPIKE_FACTOR or math.isnan(spike.norm)) and i not in consequences
    ]


def _count_samples(log: Log) -> int:
    size = log.header.get("dataset_size")
    num_ids = len({sample for spike in log.spikes for sample in spike.ids})
    return max(num_ids, size) if isinstance(size, int) else num_ids


def _rank_samples(batches: Sequence[Iterable[int | str]], num_samples: int) -> list[Suspect]:
    """Return all samples of the batches, the most frequent first."""
    sets = [frozenset(batch) for batch in batches]
    counts = Counter(sample for batch in sets for sample in batch)
    # This is the mean probability. If batches differ in size, the counts vary slightly less than binomially.
    rate = sum(map(len, sets)) / (len(sets) * num_samples) if sets else 0.0
    chances = {count: min(1.0, num_samples * _binomial_tail(count, len(sets), rate)) for count in set(counts.values())}
    return [Suspect(sample, count, rate * len(sets), chances[count]) for sample, count in counts.most_common()]


def _binomial_tail(count: int, trials: int, rate: float) -> float:
    """Return the binomial probability of at least `count` hits."""
    if rate >= 1:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1)
        + hits * math.log(rate) + (trials - hits) * math.log1p(-rate)
        for hits in range(count, trials + 1)
    ]  # fmt: skip
    return sum(map(math.exp, logs))


def _describe(
    log: Log,
    spikes: Sequence[Spike],
    num_with_ids: int,
    suspects: Sequence[Suspect],
    ranking: Sequence[Suspect],
    num_samples: int,
) -> str:
    num_outliers = np.count_nonzero(~log.finite) + len(find_spikes(log.norms))
    if num_outliers and not log.spikes:
        if log.culprits:
            culprit = log.culprits[0]
            return (
                f"{num_outliers:,} of {len(log.steps):,} steps stand out. The first non-finite gradient was that of "
                f"{printable(str(culprit))}, at step {culprit.step}. No samples are known: call recorder.note(ids=...)"
                " with the samples of the batch after each step."
            )
        return (
            f"{num_outliers:,} of {len(log.steps):,} steps stand out, but the log has no details of them. Use "
            "distclip.monitor.Recorder, and call recorder.note(ids=...) with the samples of the batch after each step."
        )
    if not spikes:
        return (
            f"No spikes: none of {len(log.steps):,} steps was recorded with a non-finite norm or with at least "
            f"{SPIKE_FACTOR:g} times the median norm before it."
        )
    if not num_with_ids:
        return (
            f"{pluralize(len(spikes), 'spike')}, but no sample ids were recorded with "
            f"{'them' if len(spikes) > 1 else 'it'}. Call recorder.note(ids=...) with the samples of the batch after "
            "each step."
        )
    prefix = f"{pluralize(num_with_ids, 'spike')} with sample ids"
    if not suspects:
        most = ranking[0]
        return (
            f"{prefix}, and no sample is in more of them than chance explains: the most frequent one, "
            f"{printable(most.id)}, is in {most.count}, which is not unusual among {num_samples:,} samples."
        )
    first = suspects[0]
    ties = [suspect for suspect in suspects if suspect.count == first.count]
    if len(ties) > 1:
        subject = f"samples {format_list([suspect.id for suspect in ties], 8)} are each in {first.count}"
        limit = " They always occur together, so the log cannot tell which of them is the cause."
    else:
        subject, limit = f"sample {printable(first.id)} is in {first.count}", ""
    chance = f"{first.expected:.1f} are expected by chance (p = {first.chance:.0e})"
    return f"{prefix}: {subject} of them, where {chance}.{limit}"
