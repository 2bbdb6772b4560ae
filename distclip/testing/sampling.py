"""Choose the scenarios of an exploration, and explore them in one process or several."""

from __future__ import annotations

import itertools
import logging
import multiprocessing as mp
import random
from collections.abc import Sequence

import torch

from .exploration import Explorer, Totals
from .scenarios import CALLS, CONDITIONS, LAYOUTS, Condition, Scenario, random_scenario

__all__ = ["SCHEDULES_PER_SCENARIO", "all_scenarios", "explore_all", "sample_in_processes", "scenario_of"]

SCHEDULES_PER_SCENARIO = 20_000
"""Number of consecutive seeds that are schedules of one scenario."""

_SIZES = (8,) * 40 + (16,) * 7 + (32,) * 2 + (64,)
"""Numbers of ranks to draw from, repeated by their weight."""


def scenario_of(seed: int, sizes: Sequence[int] = _SIZES) -> Scenario:
    """Return the scenario that the schedule of a seed belongs to.

    >>> scenario_of(0) == scenario_of(SCHEDULES_PER_SCENARIO - 1)
    True
    """
    number = seed // SCHEDULES_PER_SCENARIO
    return random_scenario(number, random.Random(number).choice(sizes))


def sample(seeds: range, sizes: Sequence[int]) -> Totals:
    """Run the schedules of some seeds in this process."""
    totals = Totals()
    with Explorer() as explorer:
        for _, group in itertools.groupby(seeds, lambda seed: seed // SCHEDULES_PER_SCENARIO):
            some = list(group)
            totals.add(explorer.sample(scenario_of(some[0], sizes), some))
    return totals


def sample_in_processes(num_schedules: int, first_seed: int, num_processes: int, sizes: range | None = None) -> Totals:
    """Run random schedules in several processes.

    Args:
        num_schedules: number of schedules.
        first_seed: seed of the first one. The others follow.
        num_processes: number of processes. 1 for this one.
        sizes: numbers of ranks. None for 8 to 64.
    """
    own = _SIZES if sizes is None else tuple(sizes)
    if num_processes == 1:
        return sample(range(first_seed, first_seed + num_schedules), own)
    # Each chunk is a whole scenario, so that no two processes run the code of the same one.
    chunk = SCHEDULES_PER_SCENARIO
    starts = range(first_seed, first_seed + num_schedules, chunk)
    chunks = [(range(start, min(start + chunk, first_seed + num_schedules)), own) for start in starts]
    totals = Totals()
    with mp.get_context("spawn").Pool(num_processes, initializer=_start) as pool:
        # The scenarios with most ranks take longest. They run first, so that the processes end at about the same time.
        chunks.sort(key=lambda chunk: -scenario_of(chunk[0][0], own).num_ranks)
        for one in pool.starmap(sample, chunks, chunksize=1):
            totals.add(one)
    totals.findings.sort(key=lambda finding: finding.seed or 0)
    return totals


def _start() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def all_scenarios(num_ranks: int = 3, every_rank: bool = True) -> list[Scenario]:
    """Return every call in every layout, with every condition of every rank or of rank 1 alone.

    >>> len(all_scenarios()), len(all_scenarios(every_rank=False))
    (306, 108)
    """
    scenarios = [Scenario(num_ranks, (one,)) for one in itertools.product(CALLS, LAYOUTS)]
    ranks = range(num_ranks) if every_rank else (1,)
    for one, name, rank in itertools.product(itertools.product(CALLS, LAYOUTS), CONDITIONS, ranks):
        scenarios.append(Scenario(num_ranks, (one,), (Condition(name, rank, 0, 100.0),)))
    return scenarios


def explore_all(scenarios: Sequence[Scenario], max_states: int = 20_000) -> Totals:
    """Run all interleavings of some scenarios, each up to a number of states."""
    totals = Totals()
    with Explorer() as explorer:
        for scenario in scenarios:
            totals.add(explorer.exhaust(scenario, max_states))
    return totals
