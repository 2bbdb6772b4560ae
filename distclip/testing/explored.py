"""State of an explored world: the history of each rank, the store, and the possible next operations.

The order of ranks matters only for messages through the store, because the result of a collective does not depend on
the order in which its ranks arrive. So a rank enters a collective as soon as it can, and only the order of store
operations is a choice. Time passes only when no rank can run. A rank that polls the store reads it again when a key has
changed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .behaviour import Access, Group, Node, Tree, accesses, look
from .network import WAITING, Network
from .scenarios import Scenario, Verdict

__all__ = ["ExploredWorld", "Play"]

_WRITES = frozenset({"set", "add", "append", "compare_set"})
"""Requests that change a key of the store."""

_FAILS = frozenset({"raises before measuring", "raises while measuring", "different arguments"})
"""Conditions that must make a call fail."""


class Play:
    """A scenario, with the data that all of its worlds share.

    Args:
        scenario: the scenario.
        trees: behaviour of every rank.

    Attributes:
        after_meetings: states of the members of a group after a series of collectives that all of them enter.
        verdicts: verdicts by the ends of all ranks.
    """

    def __init__(self, scenario: Scenario, trees: Sequence[Tree]) -> None:
        self.scenario, self.trees = scenario, trees
        self.after_meetings: dict[tuple[Node, ...], tuple[Node, ...]] = {}
        self.verdicts: dict[Any, str | None] = {}

    def meet(self, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        """Return the states of all members of a group after the collectives that all of them enter.

        Args:
            nodes: states of the members, each of which enters a collective of the group. If they enter different
                collectives, these states are returned.
        """
        after = self.after_meetings.get(nodes)
        if after is None:
            after, group = nodes, nodes[0].group
            assert group is not None
            while all(node.group is group for node in after):
                if len({node.request[2] for node in after}) > 1:
                    break
                reply = _intern(tuple([node.request[3] for node in after]))
                after = tuple(
                    [self.trees[rank].child(node, reply) for rank, node in zip(group.members, after, strict=True)]
                )
            self.after_meetings[nodes] = after
        return after


class ExploredWorld:
    """State of an explored world: the state of every rank, and of the network.

    Args:
        play: scenario of the world, and behaviour of every rank.
        dies: True if a rank that dies may do so before any of its messages.
    """

    def __init__(self, play: Play, dies: bool = False) -> None:
        trees, scenario = play.trees, play.scenario
        self.play, self.scenario, self.trees, self.num_steps, self.dies = play, scenario, trees, 0, dies
        self.nodes: list[Node] = [tree.root for tree in trees]
        self.numbers: list[list[int]] = [[] for _ in trees]
        self.network = Network(len(trees))
        self.num_messages = [0] * len(trees)
        self.deaths = {r: death for r in range(len(trees)) if (death := scenario.death_of(r)) is not None}
        # The requests of the enabled ranks are choices. The sleepers read the store again when one of their keys has
        # changed.
        self.enabled: list[int] = []
        self.sleepers: dict[int, frozenset[str]] = {}
        # Seconds that pass next if nothing happens.
        self.stretch = 0.0
        # These ranks have entered a collective since the clock last moved. The network has those that wait longer.
        self.arrived: dict[Group, dict[int, Node]] = {}
        for rank in range(len(trees)):
            if (delay := scenario.delay_of(rank)) > 0:
                self.network.start_later(rank, delay)
            else:
                self._settle(rank)
        self._deliver()

    def copy(self) -> ExploredWorld:
        """Return a world in the same state."""
        other = object.__new__(ExploredWorld)
        other.play, other.dies, other.num_steps = self.play, self.dies, self.num_steps
        other.scenario, other.trees = self.scenario, self.trees
        other.nodes, other.numbers = list(self.nodes), [list(one) for one in self.numbers]
        other.network, other.num_messages, other.deaths = (
            self.network.copy(),
            list(self.num_messages),
            dict(self.deaths),
        )
        other.enabled, other.sleepers, other.stretch = list(self.enabled), dict(self.sleepers), self.stretch
        other.arrived = {group: dict(arrived) for group, arrived in self.arrived.items()}
        return other

    def key(self, *, reduced: bool = True) -> Any:
        """Return a key that is equal for states with the same possible futures.

        Args:
            reduced: whether to omit numbers and values that no rank will read again.
        """
        network, nodes = self.network, self.nodes
        futures = [node.future for node in nodes]
        values = {
            (key, value)
            for key, value in network.values.items()
            if not reduced or any((name, key) in one for name in ("read", "change", "touch") for one in futures)
        }
        numbers = [
            tuple([number if not reduced or ("look", i) in future else None for i, number in enumerate(own)])
            for own, future in zip(self.numbers, futures, strict=True)
        ]
        return (
            tuple([node.id for node in nodes]),
            tuple(numbers),
            frozenset(values),
            network.clock,
            network.deadlines(),
            self.stretch,
            frozenset(self.enabled),
            frozenset(self.sleepers),
            frozenset(network.dead),
        )

    def choices(self, *, reduced: bool = True) -> list[tuple[str, int]]:
        """Return the possible next operations. If no rank can run, time passes first.

        Args:
            reduced: whether to omit ranks that can run later without loss of generality.
        """
        while not self.enabled:
            if not self._pass_time():
                return []
        if self.deaths and self.dies:
            choices = [("run", rank) for rank in self.enabled]
            alive = [rank for rank in self.deaths if rank not in self.network.dead and self._is_alive(rank)]
            return choices + [("die", rank) for rank in alive]
        ranks = self._persistent_ranks() if reduced and len(self.enabled) > 1 else self.enabled
        return [("run", rank) for rank in ranks]

    def _persistent_ranks(self) -> list[int]:
        """Return a few enabled ranks such that one of them may run next without loss of generality.

        Every schedule is equivalent to one in which one of them runs next. Until one of them runs, no other rank makes
        an access that depends on their next ones.
        """
        best = self.enabled
        for seed in self.enabled:
            chosen = {seed}
            while len(chosen) < len(best):
                active = self._active_ranks(chosen)
                pending = [access for r in chosen for access in accesses(self.nodes[r].request)]
                found = {r for r in active if any(_depends(access, self.nodes[r].future) for access in pending)}
                if not found:
                    best = sorted(chosen)
                    break
                if not found.issubset(self.enabled):
                    break
                chosen |= found
            if len(best) == 1:
                break
        return best

    def _active_ranks(self, paused: set[int]) -> set[int]:
        """Return the ranks that can run before any of the paused ones runs, and before time passes."""
        active = set(self.enabled).difference(paused)
        idle = [rank for rank, node in enumerate(self.nodes) if rank not in active | paused and node.kind != "end"]
        while True:
            found = {rank for rank in idle if rank not in active and self._can_be_resumed(rank, active)}
            if not found:
                return active
            active |= found

    def _can_be_resumed(self, rank: int, active: set[int]) -> bool:
        """Return whether some ranks can make another rank continue."""
        node, futures = self.nodes[rank], [self.nodes[r].future for r in active]
        kind = node.kind
        if kind in ("meet", "await"):
            return all(member in active for member in self._members_missing(node.request[1]))
        keys = self.sleepers.get(rank, ()) if kind == "sleep" else node.request[1] if kind in ("get", "wait") else None
        if keys is None:
            # A rank that has not started waits only for a time.
            return kind == "receive"
        return any((name, key) in one for key in keys for name in ("write", "change", "touch") for one in futures)

    def _members_missing(self, key: tuple[tuple[int, ...], str]) -> list[int]:
        arrived = self.arrived.get(Group.of(key)) or self.network.arrived(key)
        return [member for member in key[0] if member not in arrived]

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
        """Run to the end in random order, and return the violated invariant or None."""
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
        """Check the invariants at the end, and return the violated one or None."""
        if self.network.mismatches or any(node.request is not None for node in self.nodes):
            return self._verdict()
        key = *self.nodes, frozenset(self.network.dead)
        if key not in self.play.verdicts:
            self.play.verdicts[key] = self._verdict()
        return self.play.verdicts[key]

    def _verdict(self) -> str | None:
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
            # In a later call, the fault may happen earlier if ranks measure twice.
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
                # A rank is not in later calls if it has died, or if its component has failed.
                if outcomes == {"failed"} and any(verdict.wrote for verdict in verdicts.values()):
                    return f"a rank has written in call {call}, which failed: {verdicts}"
        return None

    def _pass_time(self) -> bool:
        """Move the clock, because no rank can run. Return False if no rank waits for a time."""
        network = self.network
        if self.arrived:
            for arrived in self.arrived.values():
                for rank, node in arrived.items():
                    network.perform(rank, node.request)
            self.arrived.clear()
        if not network.advance(self.sleepers, self.stretch) and not self._end_failed_ranks():
            return False
        self.stretch = max(0.02, 2 * self.stretch)
        self._deliver()
        return True

    def _end_failed_ranks(self) -> bool:
        """End the processes of ranks whose program has failed, and return whether other ranks can then run.

        This is not done before all ranks of the failed call have ended by themselves.
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
        """Return whether a rank has no peer to disagree with in the first call."""
        return {rank} in self.scenario.components(0)

    def _is_alive(self, rank: int) -> bool:
        return self.nodes[rank].request is not None

    def _die(self, rank: int) -> None:
        self.network.kill(rank)
        self.sleepers.pop(rank, None)
        if rank in self.enabled:
            self.enabled.remove(rank)

    def _perform(self, rank: int) -> None:
        """Carry out the store operation of a rank, and run the rank up to the next one."""
        node = self.nodes[rank]
        request, kind = node.request, node.kind
        self.num_steps += 1
        if kind == "check":
            keys, values = request[1], self.network.values
            reply: Any = keys[0] in values if len(keys) == 1 else all(key in values for key in keys)
            after = node.children.get(reply) or self.trees[rank].child(node, reply)
        else:
            reply = self.network.perform(rank, request)
            if kind in _WRITES:
                if self.sleepers and not (kind == "add" and request[2] == 0):
                    self._wake(request[1])
                self.stretch = 0.0
            elif reply is WAITING:
                return
            if kind == "add":
                self.numbers[rank].append(reply)
                found = node.after_number.get(reply)
                if found is None:
                    found = node.after_number[reply] = self._after_number(rank, node, reply)
                after = found
            else:
                after = self.trees[rank].child(node, reply)
        self.nodes[rank] = after
        self._settle(rank)

    def _after_number(self, rank: int, node: Node, number: int) -> Node:
        """Return the state of a rank after it has received and read a number."""
        tree, index = self.trees[rank], len(self.numbers[rank]) - 1
        node = tree.child(node, number)
        if not self.dies and rank in self.deaths:
            # Each look counts as a message after which the rank may die.
            return node
        while node.kind == "look" and node.request[1] == index:
            node = tree.child(node, look(number, *node.request[2:]))
        return node

    def _settle(self, rank: int) -> None:
        """Run a rank as long as its requests commute with those of all other ranks."""
        tree, node, network = self.trees[rank], self.nodes[rank], self.network
        is_mortal = not self.dies and rank in self.deaths
        while True:
            kind = node.kind
            if is_mortal and kind not in _NO_MESSAGES:
                if self.num_messages[rank] >= self.deaths[rank]:
                    self.nodes[rank] = node
                    self._die(rank)
                    return
                self.num_messages[rank] += 1
            if kind in _CHOICES:
                self.enabled.append(rank)
                break
            if kind == "end":
                break
            request: Any = node.request
            if kind == "now":
                reply = network.clock
            elif kind == "look":
                reply = look(self.numbers[rank][request[1]], *request[2:])
            elif kind == "delete":
                # A rank deletes only keys that no other rank uses any more.
                reply = network.perform(rank, request)
            elif kind in ("begin", "forget"):
                reply = None
                if kind == "forget":
                    del self.numbers[rank][request[1] :]
            else:
                self.nodes[rank] = node
                if kind == "meet" and not network.gone and not self.deaths and self._enter(rank, node):
                    return
                reply = network.perform(rank, request)
                if reply is WAITING:
                    if kind == "sleep":
                        self.sleepers[rank] = node.keys_looked_at()
                    return
                reply = _intern(reply)
            node = node.children.get(reply) or tree.child(node, reply)
        self.nodes[rank] = node

    def _enter(self, rank: int, node: Node) -> bool:
        """Enter a collective, and resume all members if they have arrived.

        Returns:
            False if the network has the collective, because a member has waited for some time.
        """
        group = node.group
        assert group is not None
        arrived = self.arrived.get(group)
        if arrived is None:
            if self.network.arrived(group.key):
                return False
            arrived = self.arrived[group] = {}
        arrived[rank] = node
        if len(arrived) < len(group.members):
            return True
        del self.arrived[group]
        nodes = tuple([arrived[member] for member in group.members])
        after = self.play.meet(nodes)
        if after is nodes:
            for member, one in zip(group.members, nodes, strict=True):
                reply = self.network.perform(member, one.request)
            self.network.ready.append((group.members[-1], reply))
            return True
        for member, one in zip(group.members, after, strict=True):
            self.nodes[member] = one
        for member in group.members:
            self._settle(member)
        return True

    def _wake(self, key: str) -> None:
        """Resume the ranks that poll a key, because it has changed."""
        for rank in [rank for rank, keys in self.sleepers.items() if key in keys]:
            self.network.cancel_deadline(rank)
            del self.sleepers[rank]
            self.network.ready.append((rank, None))

    def _deliver(self) -> None:
        """Give the waiting ranks their replies."""
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
                    # Ranks that become ready together have mostly entered the same collective.
                    if reply is not seen:
                        seen, interned = reply, _intern(reply)
                    reply = interned
                self.nodes[rank] = self.trees[rank].child(node, reply)
            # Otherwise the rank starts.
            self._settle(rank)


_CHOICES = frozenset({"add", "append", "check", "compare_set", "get", "set", "wait", "send", "receive"})
"""Requests whose order matters."""


_NO_MESSAGES = frozenset({"begin", "forget", "end"})
"""Requests that only the explorer makes, and the end of a job."""


def _depends(access: Access, future: set[Access]) -> bool:
    """Return whether an access depends on the order relative to one of a future.

    >>> _depends(("read", "key"), {("read", "key")}), _depends(("read", "key"), {("write", "key")})
    (False, True)
    """
    name, key = access
    return (
        ("write", key) in future
        or ("change", key) in future
        or (name != "read" and ("read", key) in future)
        or (name != "touch" and ("touch", key) in future)
    )


_interned: dict[Any, Any] = {}


def _intern(contents: Any) -> Any:
    """Return one object for equal contents, so that its hash is computed once."""
    return _interned.setdefault(contents, contents)
