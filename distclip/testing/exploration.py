"""Explore the schedules of a world: all interleavings of a small world, or random interleavings of a large one.

The ranks run the real code of distclip, see `behaviour`. The order of ranks matters only for messages through the
store, because the result of a collective does not depend on the order in which its ranks arrive. So a rank enters a
collective as soon as it can, and only the order of store operations is a choice. This is a partial-order reduction.
Time passes only when no rank can run. A rank that polls the store reads it again when a key has changed.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .behaviour import Actor, Tree, explored_process
from .explored import ExploredWorld, Play
from .scenarios import Scenario, make_calls, meshes_of
from .simulation import check_memory

__all__ = ["Explorer", "Finding", "Totals"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A schedule that breaks an invariant.

    Args:
        scenario: scenario of the schedule.
        seed: seed of the schedule, or None for an exhaustive exploration.
        what: the invariant, and the actions of each rank.
    """

    scenario: Scenario
    seed: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.scenario}, seed {self.seed}: {self.what}"


@dataclass
class Totals:
    """Counts of an exploration.

    Args:
        schedules: number of complete schedules that were covered.
        states: number of states of worlds.
        runs: number of times that the code of a rank ran.
        findings: schedules that break an invariant.
        num_cut: number of exhaustive explorations that were cut short.
    """

    schedules: int = 0
    states: int = 0
    runs: int = 0
    findings: list[Finding] = field(default_factory=list)
    num_cut: int = 0

    @property
    def is_complete(self) -> bool:
        """True if no exhaustive exploration was cut short."""
        return self.num_cut == 0

    def add(self, other: Totals) -> None:
        """Add the numbers of another exploration."""
        self.schedules += other.schedules
        self.states += other.states
        self.runs += other.runs
        self.findings += other.findings
        self.num_cut += other.num_cut


class Explorer:
    """Explores scenarios. The threads of its ranks are reused from one scenario to the next.

    Use it in a `with` block, during which no other simulated world runs in this process.
    """

    def __init__(self) -> None:
        self._actors: dict[int, list[Actor]] = {}
        self._process: Any = None
        self._collects = False

    def __enter__(self) -> Explorer:
        self._process = explored_process()
        self._process.__enter__()
        # Each garbage collection would traverse all modules of torch.
        self._collects = gc.isenabled()
        gc.disable()
        gc.freeze()
        return self

    def __exit__(self, *args: Any) -> None:
        for actors in self._actors.values():
            for actor in actors:
                actor.end_job()
        self._process.__exit__(*args)
        gc.unfreeze()
        if self._collects:
            gc.enable()

    def actors(self, num_ranks: int) -> list[Actor]:
        """Return the ranks of a world."""
        if num_ranks not in self._actors:
            check_memory(num_ranks)
            self._actors[num_ranks] = [
                Actor(rank, num_ranks, partial(meshes_of, num_ranks)) for rank in range(num_ranks)
            ]
        return self._actors[num_ranks]

    def sample(self, scenario: Scenario, seeds: Sequence[int]) -> Totals:
        """Run one random schedule for each seed."""
        play, totals, actors = self._play(scenario), Totals(), self.actors(scenario.num_ranks)
        before = sum(actor.num_runs for actor in actors)
        for seed in seeds:
            world = ExploredWorld(play)
            what = world.run(random.Random(seed))
            totals.schedules += 1
            totals.states += world.num_steps
            if what is not None:
                totals.findings.append(Finding(scenario, seed, what))
                break
        totals.runs = sum(actor.num_runs for actor in actors) - before
        return totals

    def exhaust(self, scenario: Scenario, max_states: int = 200_000, *, reduced: bool = True) -> Totals:
        """Run every schedule of a scenario, or one of each set of equivalent schedules.

        Schedules are equivalent if they differ only in the order of operations on different keys of the store, or of
        operations that only read. An operation is carried out at once if no other rank will make an operation that
        depends on it. The exploration learns the futures of the ranks by running them. It starts again until a run
        learns nothing new, so that no rank did anything that was not taken into account.

        Args:
            scenario: scenario with few ranks.
            max_states: number of states after which the exploration stops.
            reduced: whether to omit equivalent schedules.
        """
        play, actors = self._play(scenario, learns=True), self.actors(scenario.num_ranks)
        before = sum(actor.num_runs for actor in actors)
        while True:
            num_learned = sum(tree.num_learned for tree in play.trees)
            totals = _exhaust(play, max_states, reduced=reduced)
            if totals.findings or totals.num_cut or num_learned == sum(tree.num_learned for tree in play.trees):
                break
        totals.runs = sum(actor.num_runs for actor in actors) - before
        return totals

    def _play(self, scenario: Scenario, *, learns: bool = False) -> Play:
        gc.collect()
        trees = [
            Tree(actor, partial(make_calls, scenario, actor.prepared), scenario.faults_of(rank), learns)
            for rank, actor in enumerate(self.actors(scenario.num_ranks))
        ]
        return Play(scenario, trees)


def _exhaust(play: Play, max_states: int, *, reduced: bool) -> Totals:
    """Run every schedule once, as far as the futures of the ranks are known."""
    totals = Totals()
    # This is the number of schedules from each state that has been explored to its end.
    known: dict[Any, int] = {}

    def explore(world: ExploredWorld) -> int:
        key = world.key(reduced=reduced)
        if key in known:
            return known[key]
        choices = world.choices(reduced=reduced)
        if not choices or totals.findings or len(known) >= max_states:
            totals.num_cut |= bool(choices) and not totals.findings
            if not totals.findings and not choices and (what := world.verdict()) is not None:
                totals.findings.append(Finding(play.scenario, None, what))
            known[key] = 1
            return 1
        count = 0
        for choice in choices:
            after = world.copy()
            after.step(choice)
            count += explore(after)
        known[key] = count
        return count

    totals.schedules = explore(ExploredWorld(play, dies=True))
    totals.states = len(known)
    return totals
