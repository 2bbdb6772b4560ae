"""Explore the schedules of a world: all interleavings of a small one, or random ones of a large one.

The ranks run the real code of distclip, see `behaviour`. Only messages through the store can be interleaved in
different ways that matter: the result of a collective does not depend on the order in which its ranks have come. So a
rank enters a collective as soon as it can, and only the order of store operations is a choice. This is the reduction of
partial orders. Time passes only when no rank can run, and a rank that polls the store looks again when a key has
changed.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .behaviour import Actor, Node, Tree, explored_process, look
from .network import WAITING, Network
from .scenarios import Scenario, Verdict, make_calls, meshes_of

__all__ = ["Explorer", "Finding", "Totals"]

_WRITES = frozenset({"set", "add", "append", "compare_set"})
"""Requests that change a key of the store."""


_FAILS = frozenset({"raises before measuring", "raises while measuring", "different arguments"})
"""Conditions that must fail a call."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A schedule that breaks an invariant.

    Args:
        scenario: of the schedule.
        seed: of the schedule, or None for an exhaustive exploration.
        what: the invariant, and what each rank has done.
    """

    scenario: Scenario
    seed: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.scenario}, seed {self.seed}: {self.what}"


@dataclass
class Totals:
    """Numbers of an exploration.

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
    """Explores scenarios. It keeps the threads of its ranks from one scenario to the next.

    Use it in a `with` block, during which no other simulated world runs in this process.
    """

    def __init__(self) -> None:
        self._actors: dict[int, list[Actor]] = {}
        self._process: Any = None
        self._collects = False

    def __enter__(self) -> Explorer:
        self._process = explored_process()
        self._process.__enter__()
        # Collections would traverse the modules of torch again and again.
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
            self._actors[num_ranks] = [
                Actor(rank, num_ranks, partial(meshes_of, num_ranks)) for rank in range(num_ranks)
            ]
        return self._actors[num_ranks]

    def sample(self, scenario: Scenario, seeds: Sequence[int]) -> Totals:
        """Run one random schedule for each seed."""
        trees, totals, actors = self._trees(scenario), Totals(), self.actors(scenario.num_ranks)
        before = sum(actor.num_runs for actor in actors)
        for seed in seeds:
            world = _World(scenario, trees)
            what = world.run(random.Random(seed))
            totals.schedules += 1
            totals.states += world.num_steps
            if what is not None:
                totals.findings.append(Finding(scenario, seed, what))
                break
        totals.runs = sum(actor.num_runs for actor in actors) - before
        return totals

    def exhaust(self, scenario: Scenario, max_states: int = 200_000) -> Totals:
        """Run every schedule of a scenario.

        Args:
            scenario: of few ranks.
            max_states: number of states after which the exploration stops.
        """
        trees, totals, actors = self._trees(scenario), Totals(), self.actors(scenario.num_ranks)
        before = sum(actor.num_runs for actor in actors)
        # Number of schedules from each state that has been explored to its end.
        known: dict[Any, int] = {}

        def explore(world: _World) -> int:
            key = world.key()
            if key in known:
                return known[key]
            choices = world.choices()
            if not choices or totals.findings or len(known) >= max_states:
                totals.num_cut |= bool(choices) and not totals.findings
                if not totals.findings and not choices and (what := world.verdict()) is not None:
                    totals.findings.append(Finding(scenario, None, what))
                known[key] = 1
                return 1
            count = 0
            for choice in choices:
                after = world.copy()
                after.step(choice)
                count += explore(after)
            known[key] = count
            return count

        world = _World(scenario, trees, dies=True)
        totals.schedules = explore(world)
        totals.states = len(known)
        totals.runs = sum(actor.num_runs for actor in actors) - before
        return totals

    def _trees(self, scenario: Scenario) -> list[Tree]:
        gc.collect()
        return [
            Tree(actor, partial(make_calls, scenario, actor.prepared), scenario.faults_of(rank))
            for rank, actor in enumerate(self.actors(scenario.num_ranks))
        ]


class _World:
    """State of an explored world: the state of every rank, and of the network.

    Args:
        scenario: of the world.
        trees: behaviour of every rank.
        dies: a rank that dies may do so before each of its messages.
    """

    def __init__(self, scenario: Scenario, trees: Sequence[Tree], dies: bool = False) -> None:
        self.scenario, self.trees, self.num_steps, self.dies = scenario, trees, 0, dies
        self.nodes: list[Node] = [tree.root for tree in trees]
        self.numbers: list[list[int]] = [[] for _ in trees]
        self.network = Network(len(trees))
        self.num_messages = [0] * len(trees)
        self.deaths = {r: death for r in range(len(trees)) if (death := scenario.death_of(r)) is not None}
        # Ranks whose request is a choice, and ranks that look again when a key has changed.
        self.enabled: list[int] = []
        self.sleepers: dict[int, frozenset[str]] = {}
        # Seconds that the next eventless time takes.
        self.stretch = 0.0
        # Keys that each rank has looked at since it last slept.
        self.looked: list[frozenset[str]] = [frozenset()] * len(trees)
        for rank in range(len(trees)):
            if (delay := scenario.delay_of(rank)) > 0:
                self.network.start_later(rank, delay)
            else:
                self._settle(rank)
        self._deliver()

    def copy(self) -> _World:
        """Return a world in the same state."""
        other = object.__new__(_World)
        other.scenario, other.trees, other.num_steps, other.dies = self.scenario, self.trees, self.num_steps, self.dies
        other.nodes, other.numbers = list(self.nodes), [list(one) for one in self.numbers]
        other.network, other.num_messages, other.deaths = (
            self.network.copy(),
            list(self.num_messages),
            dict(self.deaths),
        )
        other.enabled, other.sleepers, other.looked = list(self.enabled), dict(self.sleepers), list(self.looked)
        other.stretch = self.stretch
        return other

    def key(self) -> Any:
        """Return a value that is equal for equal states."""
        network = self.network
        return (
            tuple([node.id for node in self.nodes]),
            tuple([tuple(one) for one in self.numbers]),
            frozenset(network.values.items()),
            network.clock,
            self.stretch,
            frozenset(self.enabled),
            frozenset(self.sleepers),
            frozenset(network.dead),
        )

    def choices(self) -> list[tuple[str, int]]:
        """Return what can happen next, after time has passed if no rank can run."""
        while not self.enabled:
            if not self._pass_time():
                return []
        choices = [("run", rank) for rank in self.enabled]
        if self.dies:
            choices += [("die", rank) for rank in self.deaths if rank not in self.network.dead and self._is_alive(rank)]
        return choices

    def step(self, choice: tuple[str, int]) -> None:
        """Carry out one choice."""
        name, rank = choice
        if rank in self.enabled:
            self.enabled.remove(rank)
        if name == "die":
            self._die(rank)
        else:
            self._perform(rank)
        self._deliver()

    def run(self, rng: random.Random) -> str | None:
        """Run to the end in random order, and return what is wrong."""
        enabled = self.enabled
        while True:
            while not enabled:
                if not self._pass_time():
                    return self.verdict()
            i = int(rng.random() * len(enabled))
            rank = enabled[i]
            enabled[i] = enabled[-1]
            enabled.pop()
            self._perform(rank)
            if self.network.ready:
                self._deliver()

    def verdict(self) -> str | None:
        """Check the invariants at the end. Return what is wrong, or None."""
        network, nodes = self.network, self.nodes
        alive = [rank for rank in range(len(nodes)) if rank not in network.dead]
        if network.mismatches:
            return f"ranks issue collectives in different orders: {network.mismatches[0]}"
        if waiting := [rank for rank in alive if nodes[rank].request is not None]:
            stages = {rank: f"{nodes[rank].stage}, {network.describe([rank])[rank]}" for rank in waiting}
            return f"ranks wait without end: {stages}, and others have ended with {self._ends()}"
        if broken := {rank: nodes[rank].result for rank in alive if isinstance(nodes[rank].result, BaseException)}:
            return f"ranks end with an exception outside of a call: {broken}"
        by_rank: dict[int, list[Verdict]] = {rank: nodes[rank].result for rank in alive}
        for one in self.scenario.conditions:
            # In a later call the fault may come earlier, if ranks measure twice.
            if (
                one.name in _FAILS
                and one.call == 0
                and not (one.name == "different arguments" and self._is_alone(one.rank))
                and one.rank in by_rank
                and by_rank[one.rank][0].outcome != "failed"
            ):
                return f"{one.name} on rank {one.rank} is no failure: {by_rank}"
        for call in range(len(self.scenario.calls)):
            for component in self.scenario.components(call):
                verdicts = {r: by_rank[r][call] for r in sorted(component) if r in by_rank and call < len(by_rank[r])}
                if not verdicts:
                    continue
                if not all(verdict.is_expected for verdict in verdicts.values()):
                    return f"call {call} ends with an exception that is no error of distclip: {verdicts}"
                outcomes = {verdict.outcome for verdict in verdicts.values()}
                if len(outcomes) > 1:
                    return f"call {call} has different verdicts: {verdicts}"
                # A rank that has died in an earlier call, or whose component has failed, is not in later calls.
                if outcomes == {"failed"} and any(verdict.wrote for verdict in verdicts.values()):
                    return f"a rank has written in call {call}, which failed: {verdicts}"
        return None

    def _pass_time(self) -> bool:
        """Move the clock, because no rank can run. Return False if no rank waits for a time."""
        if not self.network.advance(self.sleepers, self.stretch) and not self._end_failed_ranks():
            return False
        self.stretch = max(0.02, 2 * self.stretch)
        self._deliver()
        return True

    def _end_failed_ranks(self) -> bool:
        """End the processes of ranks whose program has failed, and return whether it changes anything.

        Ranks that took part in the failed call must have failed without that.
        """
        for rank, verdicts in self._ends().items():
            if rank in self.network.dead or type(verdicts) is not list or verdicts[-1].outcome != "failed":
                continue
            component = next(one for one in self.scenario.components(len(verdicts) - 1) if rank in one)
            if all(self.nodes[other].request is None for other in component.difference(self.network.dead)):
                self.network.end(rank)
        return bool(self.network.ready)

    def _ends(self) -> dict[int, Any]:
        return {rank: node.result for rank, node in enumerate(self.nodes) if node.request is None}

    def _is_alone(self, rank: int) -> bool:
        """Return whether a rank has no peer in the first call, with which it could disagree."""
        return {rank} in self.scenario.components(0)

    def _is_alive(self, rank: int) -> bool:
        return self.nodes[rank].request is not None

    def _die(self, rank: int) -> None:
        self.network.kill(rank)
        self.sleepers.pop(rank, None)
        if rank in self.enabled:
            self.enabled.remove(rank)

    def _perform(self, rank: int) -> None:
        """Carry out the store operation of a rank, and run the rank up to its next one."""
        node = self.nodes[rank]
        request, kind = node.request, node.kind
        assert request is not None
        self.num_steps += 1
        reply = self.network.perform(rank, request)
        if kind in _WRITES:
            if self.sleepers and not (kind == "add" and request[2] == 0):
                self._wake(request[1])
            self.stretch = 0.0
        elif kind == "check":
            self.looked[rank] |= frozenset(request[1])
        if reply is WAITING:
            return
        if kind == "add":
            self.numbers[rank].append(reply)
            after = node.after_number.get(reply)
            if after is None:
                after = node.after_number[reply] = self._after_number(rank, node, reply)
        else:
            after = self.trees[rank].child(node, reply)
        self.nodes[rank] = after
        self._settle(rank)

    def _after_number(self, rank: int, node: Node, number: int) -> Node:
        """Return the state of a rank that has been sent a number, and has looked at it."""
        tree, index = self.trees[rank], len(self.numbers[rank]) - 1
        node = tree.child(node, number)
        if not self.dies and rank in self.deaths:
            # Each look is one of the messages after which the rank dies.
            return node
        while node.kind == "look" and node.request[1] == index:
            node = tree.child(node, look(number, *node.request[2:]))
        return node

    def _settle(self, rank: int) -> None:
        """Run a rank as long as its requests commute with those of all other ranks."""
        tree, node, network = self.trees[rank], self.nodes[rank], self.network
        while True:
            kind = node.kind
            if kind == "end":
                break
            if not self.dies and rank in self.deaths:
                if self.num_messages[rank] >= self.deaths[rank]:
                    self.nodes[rank] = node
                    self._die(rank)
                    return
                self.num_messages[rank] += 1
            request: Any = node.request
            if kind == "look":
                reply = look(self.numbers[rank][request[1]], *request[2:])
            elif kind == "now":
                reply = network.clock
            elif kind == "delete":
                # A rank deletes only keys that no other rank uses any more.
                reply = network.perform(rank, request)
            elif kind in ("meet", "await", "sleep"):
                self.nodes[rank] = node
                reply = network.perform(rank, request)
                if reply is WAITING:
                    if kind == "sleep":
                        self.sleepers[rank], self.looked[rank] = self.looked[rank], frozenset()
                    return
                reply = _intern(reply)
            else:
                self.enabled.append(rank)
                break
            node = tree.child(node, reply)
        self.nodes[rank] = node

    def _wake(self, key: str) -> None:
        """Resume the ranks that poll a key, because it has changed."""
        for rank in [rank for rank, keys in self.sleepers.items() if key in keys]:
            self.network.cancel_deadline(rank)
            del self.sleepers[rank]
            self.network.ready.append((rank, None))

    def _deliver(self) -> None:
        """Give ranks that waited their replies."""
        ready = self.network.ready
        seen: Any = None
        interned: Any = None
        while ready:
            rank, reply = ready.pop()
            if rank in self.network.dead:
                continue
            self.sleepers.pop(rank, None)
            node = self.nodes[rank]
            if reply is not None or node.kind in ("sleep", "get", "wait", "receive"):
                if type(reply) is tuple:
                    # Most ranks that become ready together have entered one collective.
                    if reply is not seen:
                        seen, interned = reply, _intern(reply)
                    reply = interned
                self.nodes[rank] = self.trees[rank].child(node, reply)
            # Otherwise the rank starts.
            self._settle(rank)


_interned: dict[Any, Any] = {}


def _intern(contents: Any) -> Any:
    """Return one object for equal contents, whose hash is computed once."""
    return _interned.setdefault(contents, contents)
