"""Interleaved timing: in every round each contestant once, in random order."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from .competitors import Contestant

__all__ = ["Sample", "median_ratio", "median_seconds", "race"]

WARM_UP = 2
"""Rounds that do not count."""


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Args:
        seconds: wall clock, until the device is done; of several ranks the slowest one's.
        preempted: whether the system took a processor away meanwhile, on any rank.
    """

    seconds: float
    preempted: bool


def race(
    contestants: Sequence[Contestant],
    rounds: int,
    seed: int,
    device: torch.device,
    meet: Callable[[], object],
    advance: Callable[[], object],
) -> dict[str, list[Sample]]:
    """Time the contestants against each other.

    Args:
        contestants: who takes part.
        rounds: how often each of them is called, after a warm-up.
        seed: of the order, so that all ranks have the same.
        device: what is waited for before and after a call.
        meet: called right before each timed call: a barrier, where there are ranks.
        advance: called after each round.

    Returns:
        The samples of each contestant by name, in the order of rounds.
    """
    order = random.Random(seed)
    samples: dict[str, list[Sample]] = {each.name: [] for each in contestants}
    collected = gc.isenabled()
    gc.disable()
    # What is there already is not looked through between the rounds.
    gc.freeze()
    try:
        for number in range(-WARM_UP, rounds):
            gc.collect()
            for contestant in order.sample(contestants, len(contestants)):
                sample = _timed(contestant, device, meet)
                if number >= 0:
                    samples[contestant.name].append(sample)
            if number >= 0:
                advance()
    finally:
        gc.unfreeze()
        if collected:
            gc.enable()
    return samples


def median_seconds(samples: Sequence[Sample]) -> float:
    """The median over rounds; without preempted ones, if enough others are left."""
    return median(samples[i].seconds for i in _undisturbed([samples]))


def median_ratio(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    """The median of the rounds' ratios of two contestants; without preempted rounds, if enough others are left."""
    return median(samples[i].seconds / others[i].seconds for i in _undisturbed([samples, others]))


def _undisturbed(contestants: Sequence[Sequence[Sample]]) -> list[int]:
    """Rounds in which none of the contestants was preempted; all, if these are fewer than half or than three."""
    rounds = range(len(contestants[0]))
    good = [i for i in rounds if not any(samples[i].preempted for samples in contestants)]
    return good if len(good) >= max(3, len(rounds) / 2) else list(rounds)


def _timed(contestant: Contestant, device: torch.device, meet: Callable[[], object]) -> Sample:
    contestant.prepare()
    _wait(device)
    meet()
    before = _preemptions()
    start = time.perf_counter()
    contestant.call()
    _wait(device)
    seconds = time.perf_counter() - start
    return Sample(seconds, _preemptions() > before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _preemptions() -> int:
    """How often a thread of this process had to leave its processor."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
