"""Model the messages of a simulated world: a key-value store, collectives and a virtual clock, without running ranks.

A rank that communicates makes a request and waits for its reply. `Network.perform` returns the reply, or `WAITING` if
another rank must act first. Every collective is one gather of bytes: all members receive the contributions of all
members, in the order of the ranks, and each member computes its result from them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import inf
from typing import Any, Final, TypeAlias

__all__ = ["WAITING", "Failure", "Network", "Request"]

Request: TypeAlias = tuple[Any, ...]
"""Name of an operation, followed by its arguments."""


class _Waiting:
    def __repr__(self) -> str:
        return "WAITING"


WAITING: Final = _Waiting()
"""Reply to a request that cannot be answered before another rank acts."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Reply that the rank raises as an exception.

    Args:
        kind: "timeout" for a message that did not come, "closed" for a peer that died, "mismatch" for ranks in
            different collectives.
        text: message of the exception.
    """

    kind: str
    text: str


_TIMED_OUT = Failure("timeout", "Operation timed out!")


class Network:
    """Store, collectives and clock that all ranks of a world share.

    Args:
        num_ranks: size of the world.

    Attributes:
        clock: seconds since the start of the world.
        dead: ranks that were killed.
        gone: ranks that were killed or have ended, so that their connections are closed.
        mismatches: descriptions of the collectives that ranks have entered in different orders.

    >>> network = Network(2)
    >>> network.perform(0, ("meet", ((0, 1), "pg"), "sum", b"x")), network.perform(1, ("set", "key", b"1"))
    (WAITING, None)
    >>> network.perform(1, ("meet", ((0, 1), "pg"), "sum", b"y")), network.ready
    ((b'x', b'y'), [(0, (b'x', b'y'))])
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.clock = num_ranks, 0.0
        # A counter is stored as an integer, and converted when its value is read.
        self.values: dict[str, bytes | int] = {}
        self.dead: set[int] = set()
        self.gone: set[int] = set()
        self.mismatches: list[str] = []
        # These ranks can continue now, with the reply to their request. The scheduler empties the list.
        self.ready: list[tuple[int, Any]] = []
        # `_waits` has the keys that each rank waits for, and whether the reply is a value. `_waiting_for` has the ranks
        # by key, in order.
        self._waits: dict[int, tuple[tuple[str, ...], bool]] = {}
        self._waiting_for: dict[str, dict[int, None]] = {}
        self._deadlines: dict[int, tuple[float, Any]] = {}
        # By group, this has the contributions of its ranks to the next collective.
        self._meetings: dict[Any, dict[int, tuple[str, bytes]]] = {}
        # These members of a collective stopped waiting for it after a timeout. The values are the replies for them.
        self._away: dict[tuple[int, Any], Any] = {}
        # These members of a collective wait with a timeout.
        self._waiting_in: dict[int, Any] = {}
        self._mail: dict[Any, list[bytes]] = {}
        self._receivers: dict[Any, int] = {}

    def perform(self, rank: int, request: Request) -> Any:
        """Carry out a request.

        Returns:
            The reply, a `Failure`, or `WAITING`. Afterwards, `ready` has the waiting ranks that can now continue.
        """
        name = request[0]
        if name in ("get", "wait"):
            return self._wait(rank, request[1], request[2], with_value=name == "get")
        if name == "check":
            return self._have(request[1])
        if name == "add":
            total = int(self.values.get(request[1], 0)) + request[2]
            self._set(request[1], total)
            return total
        if name == "set":
            self._set(request[1], request[2])
            return None
        if name == "meet":
            return self._meet(rank, *request[1:])
        if name == "await":
            return self._await(rank, *request[1:])
        if name == "now":
            return self.clock
        if name == "sleep":
            self._deadlines[rank] = self.clock + request[1], None
            return WAITING
        if name == "delete":
            return self.values.pop(request[1], None) is not None
        if name == "compare_set":
            return self._compare_set(*request[1:])
        if name == "append":
            self._set(request[1], (self._value(request[1]) or b"") + request[2])
            return None
        if name == "send":
            return self._send(*request[1:])
        if name == "receive":
            return self._receive(rank, request[1])
        raise AssertionError(f"no operation {request!r:.80}")

    def start_later(self, rank: int, seconds: float) -> None:
        """Set the time at which a rank starts, in seconds from now."""
        self._deadlines[rank] = self.clock + seconds, None

    def cancel_deadline(self, rank: int) -> None:
        """Remove the deadline of a rank."""
        self._deadlines.pop(rank, None)

    def deadlines(self) -> frozenset[tuple[int, float]]:
        """Return the ranks that wait with a timeout, with their deadlines."""
        return frozenset([(rank, at) for rank, (at, _) in self._deadlines.items()])

    def arrived(self, group: Any) -> Collection[int]:
        """Return the ranks that wait in the next collective of a group."""
        return self._meetings.get(group, ())

    def copy(self) -> Network:
        """Return a network in the same state."""
        other = Network(self.num_ranks)
        other.clock, other.values = self.clock, dict(self.values)
        other.dead, other.gone = set(self.dead), set(self.gone)
        other.mismatches, other.ready = list(self.mismatches), list(self.ready)
        other._waits, other._deadlines = dict(self._waits), dict(self._deadlines)
        other._waiting_for = {key: dict(ranks) for key, ranks in self._waiting_for.items()}
        other._meetings = {group: dict(arrived) for group, arrived in self._meetings.items()}
        other._away, other._waiting_in = dict(self._away), dict(self._waiting_in)
        other._mail = {line: list(mail) for line, mail in self._mail.items()}
        other._receivers = dict(self._receivers)
        return other

    def kill(self, rank: int) -> None:
        """Remove a rank, so that its collectives fail on the other members."""
        self.dead.add(rank)
        self.end(rank)

    def end(self, rank: int) -> None:
        """Close the connections of a rank."""
        self.gone.add(rank)
        self._end_wait(rank)
        self._waiting_in.pop(rank, None)
        self._deadlines.pop(rank, None)
        for group, arrived in self._meetings.items():
            if rank in group[0]:
                arrived.pop(rank, None)
                self._end_meeting(group, self._closed(group))

    def advance(self, sleepers: Collection[int] = (), stretch: float = 0.0) -> bool:
        """Move the clock to the next deadline, because no rank can run. Return False if there is none.

        Args:
            sleepers: ranks that poll the store.
            stretch: minimum number of seconds that all of them sleep, so that a minute without events has few polls.
        """
        if not self._deadlines:
            return False
        hard = min((at for rank, (at, _) in self._deadlines.items() if rank not in sleepers), default=inf)
        soft = min((at for rank, (at, _) in self._deadlines.items() if rank in sleepers), default=inf)
        self.clock = max(self.clock, min(hard, max(soft, self.clock + stretch)))
        due = [rank for rank, (at, _) in self._deadlines.items() if at <= self.clock]
        for rank in due:
            reply = self._deadlines.pop(rank)[1]
            self._end_wait(rank)
            if rank in self._waiting_in:
                self._away[rank, self._waiting_in.pop(rank)] = WAITING
            self.ready.append((rank, reply))
        return True

    def _have(self, keys: tuple[str, ...]) -> bool:
        """Return whether all keys have values."""
        values = self.values
        return keys[0] in values if len(keys) == 1 else all(key in values for key in keys)

    def _value(self, key: str) -> bytes | None:
        value = self.values.get(key)
        return str(value).encode() if type(value) is int else value  # type: ignore[return-value]

    def _set(self, key: str, value: bytes | int) -> None:
        self.values[key] = value
        # There are few such keys, and many ranks wait for each.
        if self._waiting_for and key in (waited := self._waiting_for):
            for rank in list(waited[key]):
                keys, with_value = self._waits[rank]
                if self._have(keys):
                    self._end_wait(rank)
                    self._deadlines.pop(rank, None)
                    self.ready.append((rank, self._value(keys[0]) if with_value else None))

    def _wait(self, rank: int, keys: tuple[str, ...], timeout: float, *, with_value: bool) -> Any:
        if self._have(keys):
            return self._value(keys[0]) if with_value else None
        self._waits[rank] = keys, with_value
        for key in keys:
            self._waiting_for.setdefault(key, {})[rank] = None
        text = f"wait timeout after {timeout * 1000:.0f}ms, keys: {', '.join(keys)}"
        self._deadlines[rank] = self.clock + timeout, Failure("timeout", text)
        return WAITING

    def _end_wait(self, rank: int) -> None:
        """Remove a rank from the ranks that wait for keys."""
        if rank not in self._waits:
            return
        for key in {*self._waits.pop(rank)[0]}:
            ranks = self._waiting_for[key]
            del ranks[rank]
            if not ranks:
                del self._waiting_for[key]

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        present = self._value(key)
        if (present is None and not expected) or present == expected:
            self._set(key, desired)
            return desired
        return expected if present is None else present

    def _meet(
        self, rank: int, group: tuple[tuple[int, ...], str], kind: str, content: bytes, seconds: float = inf
    ) -> Any:
        members = group[0]
        if self.gone and not self.gone.isdisjoint(members):
            return self._closed(group)
        arrived = self._meetings.setdefault(group, {})
        arrived[rank] = kind, content
        if len(arrived) < len(members):
            return self._wait_for_members(rank, group, seconds)
        reply: Any = tuple([arrived[member][1] for member in members])
        if len({kind for kind, _ in arrived.values()}) > 1:
            kinds = {member: arrived[member][0] for member in members}
            self.mismatches.append(f"the ranks of one collective have entered {kinds}")
            reply = Failure("mismatch", f"ranks are in different collectives: {kinds}")
        del arrived[rank]
        self._end_meeting(group, reply)
        return reply

    def _await(self, rank: int, group: tuple[tuple[int, ...], str], seconds: float) -> Any:
        reply = self._away.pop((rank, group))
        return self._wait_for_members(rank, group, seconds) if reply is WAITING else reply

    def _wait_for_members(self, rank: int, group: tuple[tuple[int, ...], str], seconds: float) -> Any:
        if seconds < inf:
            self._deadlines[rank] = self.clock + seconds, _TIMED_OUT
            self._waiting_in[rank] = group
        return WAITING

    def _end_meeting(self, group: tuple[tuple[int, ...], str], reply: Any) -> None:
        """Give the ranks that have arrived their reply."""
        arrived = self._meetings[group]
        for member in arrived:
            if (member, group) in self._away:
                self._away[member, group] = reply
                continue
            if self._waiting_in.pop(member, None) is not None:
                self._deadlines.pop(member, None)
            self.ready.append((member, reply))
        arrived.clear()

    def _closed(self, group: tuple[tuple[int, ...], str]) -> Failure:
        gone = sorted(self.gone.intersection(group[0]))
        return Failure("closed", f"Connection closed by peer: rank {gone[0]} has ended.")

    def _send(self, line: Any, content: bytes) -> None:
        self._mail.setdefault(line, []).append(content)
        if line in self._receivers:
            self.ready.append((self._receivers.pop(line), self._mail[line].pop(0)))

    def _receive(self, rank: int, line: Any) -> Any:
        if self._mail.get(line):
            return self._mail[line].pop(0)
        self._receivers[line] = rank
        return WAITING

    def describe(self, ranks: Iterable[int]) -> dict[int, str]:
        """Describe what each rank waits for."""
        texts = {}
        for rank in ranks:
            met = [group for group, arrived in self._meetings.items() if rank in arrived]
            if rank in self._waits:
                texts[rank] = f"waits for the keys {', '.join(self._waits[rank][0])}"
            elif met:
                arrived = self._meetings[met[0]]
                missing = [member for member in met[0][0] if member not in arrived]
                texts[rank] = f"waits in {arrived[rank][0]} ({met[0][1]}) for ranks {missing}"
            else:
                texts[rank] = "waits for a message"
        return texts
