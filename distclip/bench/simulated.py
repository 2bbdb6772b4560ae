"""Run ranks of a store protocol in one process and one thread, in virtual time, and count the costs of each rank.

A rank is a function of a store and a clock. If it would block, an exception stops it. Later it runs again from its
beginning, with the recorded answers to all of its earlier operations. So 65,536 ranks need no threads.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

__all__ = ["RankCosts", "SimulatedStore", "run_ranks"]

_TIMED_OUT = object()

_PREEMPTIONS = 0.1
"""Probability that another rank runs between two operations of a rank, if the order is random."""


@dataclass(slots=True)
class RankCosts:
    """Costs of one rank: operations of the store, and bytes of their keys and values."""

    operations: int = 0
    sent: int = 0
    received: int = 0


class _Blocked(BaseException):
    """Stops a rank until a key has a value, or until a time."""

    def __init__(self, key: str | None, until: float | None) -> None:
        self.key, self.until = key, until


class _World:
    """The values of a store, and the ranks that wait for them."""

    def __init__(self, seed: int | None) -> None:
        self.random = None if seed is None else random.Random(seed)
        self.now = 0.0
        self.values: dict[str, bytes] = {}
        self.waiting: dict[str, list[SimulatedStore]] = {}
        self.timers: list[tuple[float, int, SimulatedStore, int]] = []
        self.ready: list[SimulatedStore] = []

    def write(self, key: str, value: bytes) -> None:
        self.values[key] = value
        for store in self.waiting.pop(key, ()):
            store.wake()


class SimulatedStore:
    """Store and clock of one simulated rank.

    Args:
        world: world that all ranks share.
        rank: index of the rank.
    """

    def __init__(self, world: _World, rank: int) -> None:
        self.costs = RankCosts()
        self.rank, self._world = rank, world
        self._log: list[Any] = []
        self._next, self._num_stops = 0, 0
        self._stop: _Blocked | None = None
        self._is_waiting, self._is_late = False, False

    def set(self, key: str, value: str) -> None:
        """Write a value."""

        def run() -> None:
            self._count(len(key) + len(value), 0)
            self._world.write(key, value.encode())

        self._do(run)

    def get(self, key: str) -> bytes:
        """Wait for a value, and read it."""

        def run() -> Any:
            value = self._await(key, None)
            self._count(len(key), len(value))
            return value

        value: bytes = self._do(run)
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return the sum."""

        def run() -> int:
            self._count(len(key) + 8, 8)
            total = int(self._world.values.get(key, b"0")) + amount
            self._world.write(key, str(total).encode())
            return total

        total: int = self._do(run)
        return total

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys have a value."""

        def run() -> bool:
            self._count(sum(map(len, keys)), 1)
            return all(key in self._world.values for key in keys)

        return bool(self._do(run))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until all keys have a value, or raise RuntimeError."""

        def run() -> object:
            for key in keys:
                if self._await(key, self._world.now + timeout.total_seconds()) is None:
                    self._count(sum(map(len, keys)), 1)
                    return _TIMED_OUT
            self._count(sum(map(len, keys)), 1)
            return None

        if self._do(run) is _TIMED_OUT:
            raise RuntimeError("Wait timeout")

    def delete_key(self, key: str) -> bool:
        """Remove a value, and return whether there was one."""

        def run() -> bool:
            self._count(len(key), 1)
            return self._world.values.pop(key, None) is not None

        return bool(self._do(run))

    def monotonic(self) -> float:
        """Return the virtual time in seconds."""
        now: float = self._do(lambda: self._world.now)
        return now

    def sleep(self, seconds: float) -> None:
        """Wait for some virtual time."""

        def run() -> None:
            if not self._is_late:
                raise _Blocked(None, self._world.now + seconds)
            self._is_late = False

        self._do(run)

    def wake(self) -> None:
        """Schedule the rank to run again."""
        if self._is_waiting:
            self._is_waiting = False
            self._world.ready.append(self)

    def run(self, function: Callable[[SimulatedStore], Any]) -> tuple[bool, Any]:
        """Run the rank from its beginning until it blocks, or until it returns a result: (True, result)."""
        self._next, self._stop = 0, None
        try:
            return True, function(self)
        except _Blocked as blocked:
            self._is_waiting = True
            self._num_stops += 1
            if blocked.key is None and blocked.until is None:
                self.wake()
            if blocked.key is not None:
                self._world.waiting.setdefault(blocked.key, []).append(self)
            if blocked.until is not None:
                heapq.heappush(self._world.timers, (blocked.until, self.rank, self, self._num_stops))
            return False, None

    def time_out(self, number: int) -> None:
        """End a wait at its time limit, unless the rank has continued since then."""
        if self._is_waiting and self._num_stops == number:
            self._is_late = True
            self.wake()

    def _await(self, key: str, until: float | None) -> Any:
        """Return the value of a key, or None after the time limit."""
        if key in self._world.values:
            self._is_late = False
            return self._world.values[key]
        if self._is_late:
            self._is_late = False
            return None
        raise _Blocked(key, until)

    def _do(self, run: Callable[[], Any]) -> Any:
        """Return the recorded answer of an operation, or run it and record its answer."""
        if self._stop is not None:
            # The rank is being stopped, so the operations of its cleanup must have no effect.
            raise self._stop
        if self._next < len(self._log):
            self._next += 1
            return self._log[self._next - 1]
        try:
            if self._world.random is not None and not self._is_late and self._world.random.random() < _PREEMPTIONS:
                raise _Blocked(None, None)
            answer = run()
        except _Blocked as blocked:
            self._stop = blocked
            raise
        self._log.append(answer)
        self._next += 1
        return answer

    def _count(self, sent: int, received: int) -> None:
        self.costs.operations += 1
        self.costs.sent += sent
        self.costs.received += received


def run_ranks(
    function: Callable[[SimulatedStore], Any], size: int, seed: int | None = None
) -> tuple[list[Any], list[RankCosts]]:
    """Run a function on every rank, on one store.

    Args:
        function: called with the store of a rank, possibly several times. It must make the same operations each time,
            given the same answers.
        size: number of ranks.
        seed: seed of the order of operations of different ranks. None to run each rank until it blocks.

    Returns:
        Results and costs, by rank.

    Raises:
        RuntimeError: ranks wait for each other without a time limit.

    >>> def function(store):
    ...     store.set(str(store.rank), "x")
    ...     return store.get(str(1 - store.rank))
    >>> run_ranks(function, 2)[0]
    [b'x', b'x']
    """
    world = _World(seed)
    stores = [SimulatedStore(world, rank) for rank in range(size)]
    results: list[Any] = [None] * size
    # The last rank in the list runs next.
    world.ready.extend(reversed(stores))
    num_running = size
    while num_running:
        if not world.ready:
            if not world.timers:
                raise RuntimeError(f"{num_running} simulated ranks wait for each other.")
            world.now, _, store, number = heapq.heappop(world.timers)
            store.time_out(number)
            continue
        store = world.ready.pop(-1 if world.random is None else world.random.randrange(len(world.ready)))
        is_done, result = store.run(function)
        if is_done:
            results[store.rank] = result
            num_running -= 1
    return results, [store.costs for store in stores]
