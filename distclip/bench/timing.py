"""Time competitors in interleaved rounds. Each is called once per round, in random order."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from .competitors import Competitor

__all__ = ["Sample", "median_ratio", "median_seconds", "time_interleaved"]

WARM_UP = 2
"""Number of rounds that are not recorded."""


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Args:
        seconds: wall-clock time until the device has finished, on the slowest rank.
        preempted: whether the operating system preempted a thread of the process, on any rank.
    """

    seconds: float
    preempted: bool


def time_interleaved(
    competitors: Sequence[Competitor],
    rounds: int,
    seed: int,
    device: torch.device,
    barrier: Callable[[], object],
    advance: Callable[[], object],
) -> dict[str, list[Sample]]:
    """Time the competitors against each other.

    Args:
        competitors: competitors to time.
        rounds: number of timed calls of each competitor, after a warm-up.
        seed: seed of the order, so that all ranks have the same order.
        device: device that is synchronized before and after a call.
        barrier: function that is called right before each timed call.
        advance: called after each round.

    Returns:
        Samples by the name of the competitor, in the order of rounds.
    """
    order = random.Random(seed)
    samples: dict[str, list[Sample]] = {competitor.name: [] for competitor in competitors}
    gc_enabled = gc.isenabled()
    gc.disable()
    # gc.collect between the rounds then ignores existing objects.
    gc.freeze()
    try:
        for number in range(-WARM_UP, rounds):
            gc.collect()
            for competitor in order.sample(competitors, len(competitors)):
                sample = _time_call(competitor, device, barrier)
                if number >= 0:
                    samples[competitor.name].append(sample)
            if number >= 0:
                advance()
    finally:
        gc.unfreeze()
        if gc_enabled:
            gc.enable()
    return samples


def median_seconds(samples: Sequence[Sample]) -> float:
    """Return the median over rounds, without preempted rounds if enough others are left."""
    return median(samples[i].seconds for i in _undisturbed([samples]))


def median_ratio(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    """Return the median of the rounds' ratios of two competitors, preempted rounds excluded."""
    return median(samples[i].seconds / others[i].seconds for i in _undisturbed([samples, others]))


def _undisturbed(competitors: Sequence[Sequence[Sample]]) -> list[int]:
    """Return the rounds without preemption, or all rounds if fewer than half or three are left."""
    rounds = range(len(competitors[0]))
    kept = [i for i in rounds if not any(samples[i].preempted for samples in competitors)]
    return kept if len(kept) >= max(3, len(rounds) / 2) else list(rounds)


def _time_call(competitor: Competitor, device: torch.device, barrier: Callable[[], object]) -> Sample:
    competitor.prepare()
    _wait(device)
    barrier()
    before = _preemptions()
    start = time.perf_counter()
    competitor.call()
    _wait(device)
    seconds = time.perf_counter() - start
    return Sample(seconds, _preemptions() > before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _preemptions() -> int:
    """Return the number of times that a thread of this process was preempted."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
