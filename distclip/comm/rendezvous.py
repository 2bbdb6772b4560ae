"""Find the ranks that take part in a first call, through a store: `Rendezvous`.

The ranks of one call are a connected component: each of them shares a mesh or an axis with another one. Most ranks can
derive the whole component from their own meshes (`Known`). So a rendezvous has three stages, and usually ends after the
first:

1. Count. Every rank adds 1 to a counter of its component. The sum contains a hash of the arguments too. The last rank
   finds that all ranks are present and have equal arguments, and writes the result that the others wait for. A rank
   sends and receives a few hundred bytes, for any number of ranks.
2. Compare, if all ranks are present and some arguments differ: an error on one rank, or another number of process
   groups. Every distinct set of arguments is written once, and the last rank compares them.
3. Search, if ranks have derived different parts of the component, or contradict each other. Every rank posts the groups
   that it has, and the lowest rank follows the posts until it has the whole component. In a large job it reads only
   some of the posts, and passes the lead on to a rank whose post it has read. So the ranks that have led form a chain.
   At the end, each of them withdraws the posts that it has read, from the last rank of the chain to the first. Then
   each publishes the result, from the first rank to the last.

A rank that waits in stage 1 for ranks that are in stage 3 is sent there too: either by the first rank of its component,
which watches for such ranks, or by the rank of stage 3 that needs it. The names of the counters contain the number of
the round, so that ranks that come later begin another round. Nothing here uses a collective.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from ..errors import DisagreementError, from_wire, to_wire
from .agreement import zero_sum_weight
from .consensus import axes_contradiction, describe_axes
from .ranks import (
    Axis,
    Grid,
    Ranks,
    ascending,
    decode_ranks,
    digest_of,
    encode_ranks,
    grid_of_lines,
    pack_ranks,
    rank_list,
    unpack_ranks,
)
from .waiting import patience

__all__ = ["Clock", "Component", "KeyValueStore", "Known", "Post", "Rendezvous", "derive_component"]

_log = logging.getLogger("distclip")


class KeyValueStore(Protocol):
    """The part of a torch.distributed Store that a rendezvous uses."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""
        ...

    def get(self, key: str, /) -> bytes:
        """Read a value. It blocks until there is one."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0, and return the sum."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys have a value."""
        ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Wait until all keys have a value. Raise RuntimeError after the timeout."""
        ...

    def delete_key(self, key: str, /) -> bool:
        """Remove a value."""
        ...


class Clock(Protocol):
    """The part of the module `time` that a rendezvous uses."""

    def monotonic(self) -> float:
        """Return the time in seconds."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
        ...


@dataclass(frozen=True, slots=True)
class Known:
    """Component that a rank has derived from its own meshes, before any exchange with other ranks.

    Args:
        ranks: ranks of the component, ascending.
        axes: text about the axes of `split_over=` that is equal on all ranks of the component if the axes are
            consistent.
    """

    ranks: Ranks
    axes: str = ""


@dataclass(frozen=True, slots=True)
class Post:
    """Message of one rank in a rendezvous.

    Args:
        groups: rank groups of this rank's meshes and axes.
        axes: axes of this rank's `split_over=`.
        num_groups: number of process groups that this rank belongs to.
        error: (class name, message) of the error that this rank has run into, or None.
        num_reached: numbers of ranks that the layouts of this rank reach.
        known: the component, if this rank can derive it.
        token: text that is unique to this rank and call. Other ranks send the result of a search to it.
    """

    groups: tuple[Ranks, ...]
    axes: tuple[Axis, ...] = ()
    num_groups: int = 0
    error: tuple[str, str] | None = None
    num_reached: tuple[float, ...] = ()
    known: Known | None = None
    # Tokens are never used twice, so that no rank reads the result of an earlier call.
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:16])

    @property
    def neighbours(self) -> frozenset[int]:
        """Ranks that share a group or an axis with this rank, this rank included."""
        return frozenset(rank for ranks in self.groups for rank in ranks)

    def is_mixed(self, known: Known) -> bool:
        """Return whether the layouts of this rank reach only a part of a component."""
        return any(num != len(known.ranks) for num in self.num_reached)

    def arguments(self, known: Known) -> str:
        """Return the arguments that are equal on all ranks in most calls, as JSON."""
        return json.dumps([known.axes, self.num_groups, self.is_mixed(known), self.error])


@dataclass(frozen=True, slots=True)
class Component:
    """Result of a rendezvous: a connected component of ranks that share meshes and axes.

    Args:
        ranks: global ranks of the component, ascending.
        num_groups: largest number of process groups that any of the ranks belongs to.
        is_mixed: whether the layouts of some rank reach only a part of the ranks.
    """

    ranks: Ranks
    num_groups: int
    is_mixed: bool = False


# ---- Values in the store ----

_SEARCH: dict[str, Any] = {"stage": "search"}
"""Result of a round whose ranks must search."""

_COMPARE: dict[str, Any] = {"stage": "compare"}
"""Result of a round whose ranks must compare their arguments."""

_ENDED = (
    "a rank has ended while the ranks of a first call were finding each other. The traceback of that rank has the "
    "reason. Make the same calls on every rank."
)

_WITHDRAWN = "-"
"""Value of a withdrawn post. `Store.get` blocks on a deleted key, so withdrawn posts are overwritten instead."""

_MAX_RANKS = 1 << 20
"""Number of ranks that a counter has room for."""

_HASH_BITS = 22
"""Number of bits of a hash, so that the sum of all hashes fits into a counter above the number of ranks."""

_CLOSED = -(1 << 62)
"""Number added to the counter of a round that no rank may join any more, so that it is negative from then on."""

_MAX_INLINE = 120
"""Number of characters up to which the ranks of a group are written into every post, and not under a separate key."""

_FIRST_PAUSE, _MAX_PAUSE = 0.002, 0.25
"""Seconds between two checks of the store, at first and at most. Ranks in step find each other in the first pause."""

_LOG_AFTER = 20.0
"""Seconds that a rank waits for others before it logs which ranks are missing. DISTCLIP_PATIENCE overrides it."""

_SCAN_AFTER = 1.0
"""Seconds after which the first rank of a round looks for ranks of the component that are not in it."""

_GRACE = 0.03
"""Seconds that a rank may be in another round before the round is sent to search."""

_MARGIN = 20.0
"""Seconds that a rank waits beyond its deadline for another rank to write the common result."""

_WINDOW = 64
"""Number of ranks that a watching or leading rank looks for at once."""

_MAX_POSTS = 128
"""Number of posts that a leading rank reads before it passes the lead on. They are 32 KiB."""


def _success(ranks: Ranks | None, num_groups: int, *, is_mixed: bool) -> dict[str, Any]:
    return {
        "error": None,
        "ranks": None if ranks is None else pack_ranks(ranks),
        "num_groups": num_groups,
        "is_mixed": is_mixed,
    }


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _failure(rank: int | None, kind: str, message: str) -> dict[str, Any]:
    return {"error": (rank, kind, message)}


@dataclass(frozen=True, slots=True)
class _Found:
    """Post of a search, as another rank reads it.

    Args:
        token: see `Post`.
        groups: ranks of each group, as text.
        axes: (ranks as text, name, identity) of each axis.
        num_groups, error, num_reached: see `Post`.
    """

    token: str
    groups: tuple[str, ...]
    axes: tuple[tuple[str, str | None, str], ...]
    num_groups: int
    error: tuple[str, str] | None
    num_reached: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Rendezvous that a rank is in: a round of stage 1 with a number of ranks, or a post of stage 3."""

    round: str = ""
    size: int = 0
    found: _Found | None = None


_NOWHERE = _Place()


@dataclass(slots=True)
class _Lead:
    """Facts of a search, which the rank that leads it passes on to the next one.

    Args:
        search: name of the search.
        first: rank that has begun it, the lowest one.
        axes: axes of that rank, as in its post.
        before: token of the rank that has passed the lead on, empty on the first one.
        known: ranks of the component, as far as they are known.
        read: those whose posts were read.
        error: (rank, class name, message) of the lowest rank with an error.
        num_groups, num_reached: see `Post`, of all posts.
        checksum: checksum of all axes. It is 0 if every rank along each axis has passed it.
        differs: whether ranks have passed different numbers of axes, or different names.
        log_at: time of the next log line.
        is_logged: whether a log line was written.
        deadline: deadline of the search.
    """

    search: str
    first: int
    axes: tuple[tuple[str, str | None, str], ...]
    before: str
    known: set[int]
    read: set[int]
    log_at: float
    deadline: float
    error: tuple[int, str, str] | None = None
    num_groups: int = 0
    num_reached: set[float] = field(default_factory=set)
    checksum: int = 0
    differs: bool = False
    is_logged: bool = False

    def encode(self, before: str, now: float) -> dict[str, Any]:
        """Return a message to the next rank. Clocks differ between ranks, so it has times relative to now."""
        return {
            "do": "lead",
            "search": self.search,
            "first": self.first,
            "axes": self.axes,
            "before": before,
            "read": pack_ranks(sorted(self.read)),
            # This is shorter than all known ranks, because most of them were read.
            "missing": pack_ranks(sorted(self.known - self.read)),
            "error": self.error,
            "numbers": [self.num_groups, sorted(self.num_reached), self.checksum, self.differs, self.is_logged],
            "times": [self.log_at - now, self.deadline - now],
        }

    @staticmethod
    def decode(message: Mapping[str, Any], now: float) -> _Lead:
        """Read what `encode` has written."""
        num_groups, num_reached, checksum, differs, is_logged = message["numbers"]
        log_in, seconds = message["times"]
        return _Lead(
            message["search"],
            message["first"],
            tuple(map(tuple, message["axes"])),
            message["before"],
            {*unpack_ranks(message["read"]), *unpack_ranks(message["missing"])},
            set(unpack_ranks(message["read"])),
            now + log_in,
            now + seconds,
            None if message["error"] is None else tuple(message["error"]),
            num_groups,
            set(num_reached),
            checksum,
            differs,
            is_logged,
        )


@dataclass(slots=True)
class _Part:
    """Part of a search that this rank has led.

    Args:
        posts: posts that it has read, by rank. More are added while it leads.
        before, after: tokens of the ranks that have led before and after it. They are empty at the ends of the chain.
        late: ranks that have given up.
    """

    posts: dict[int, _Found]
    before: str
    after: str = ""
    late: list[int] = field(default_factory=list)


class Rendezvous:
    """Find the connected component of ranks around this one, through a store.

    It neither reads nor awaits ranks of another model.

    Args:
        store: store that all ranks share, and that nothing else uses under the same prefix.
        rank: global rank of this process.
        clock: returns the time, and sleeps.
        call: called from time to time with the missing ranks and all ranks, because the missing ones may wait
            elsewhere.
    """

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        clock: Clock = time,
        call: Callable[[Sequence[int], Sequence[int]], None] = lambda missing, ranks: None,
    ) -> None:
        self._store = store
        self._rank = rank
        self._clock, self._call = clock, call
        # Ranks of groups by their text, so that a group is decoded once.
        self._groups: dict[str, frozenset[int]] = {}

    def join(self, post: Post, timeout: timedelta) -> Component:
        """Find every rank that this one is connected to.

        Args:
            post: message of this rank.
            timeout: time to wait for a rank that does not call.

        Raises:
            DisagreementError: a rank did not call, or the ranks' axes contradict each other; on all ranks that called.
            DistclipError: an error that some rank posted; on all ranks that called.

        Collectives: none. Host syncs: none (a store on the host is read).
        """
        deadline = self._now() + timeout.total_seconds()
        result = _SEARCH if post.known is None else self._count(post, post.known, deadline)
        if result == _SEARCH:
            result = self._search(post, deadline)
        if result["error"] is not None:
            raise from_wire(*result["error"])
        if result["ranks"] is None:
            assert post.known is not None, "only ranks that have derived the component omit it"
            return Component(post.known.ranks, result["num_groups"], result["is_mixed"])
        return Component(unpack_ranks(result["ranks"]), result["num_groups"], result["is_mixed"])

    def _now(self) -> float:
        return self._clock.monotonic()

    # ---- Stage 1: count ----

    def _count(self, post: Post, known: Known, deadline: float) -> dict[str, Any]:
        """Wait until all ranks of a known component are present, and return the result."""
        name, size = digest_of(known.ranks), len(known.ranks)
        base = f"{name}/{self._store.add(f'{name}/round', 0)}"
        # This is written before the rank is counted, so that every counted rank can be found.
        self._store.set(self._at(self._rank), f"{base} {size}")
        # One counter counts the ranks and sums the hashes of their arguments.
        arguments = post.arguments(known)
        own_hash = zlib.crc32(arguments.encode()) % (1 << _HASH_BITS)
        total = self._store.add(f"{base}/arrived", 1 + own_hash * _MAX_RANKS)
        num_arrived, hashes = total % _MAX_RANKS, total // _MAX_RANKS
        if total > 0 and num_arrived == size:
            # Different arguments have the same sum only once in four million times.
            is_equal = hashes == own_hash * size
            result = _success(None, post.num_groups, is_mixed=post.is_mixed(known)) if is_equal else _COMPARE
            self._end_round(base, result)
        else:
            try:
                # The counter is negative if the round was closed after this rank had read its number.
                result = self._await_round(base, post, known, deadline, watch=total == 1 + own_hash * _MAX_RANKS)
            except BaseException as error:
                self._close(base, size, _failure(self._rank, *to_wire(error)))
                raise
        return self._compare(base, arguments, known, deadline) if result == _COMPARE else result

    def _await_round(self, base: str, post: Post, known: Known, deadline: float, *, watch: bool) -> dict[str, Any]:
        """Wait for the result of a round. At the deadline, end the round for all of its ranks.

        Args:
            base: prefix of the round.
            post, known, deadline: those of this rank.
            watch: True on one rank, which looks for ranks with other meshes, and logs the missing ones.
        """
        key = f"{base}/result"
        if watch:
            self._watch(base, post, known, deadline)
        elif not self._is_written(key, deadline + _MARGIN):
            self._close(base, len(known.ranks), self._round_failure(base, post, known))
        return self._read(key, self._now() + _MARGIN)

    def _watch(self, base: str, post: Post, known: Known, deadline: float) -> None:
        """Wait until a round has ended, and end it if it cannot be completed.

        Only the first rank of a round polls. The other ranks block.
        """
        # Ranks of small groups come first, because they are the most likely to have posted something else.
        others = [r for ranks in sorted(post.groups, key=len) for r in ranks] + [*known.ranks]
        others = [r for r in dict.fromkeys(others) if r != self._rank]
        start, pause, begin = self._now(), _FIRST_PAUSE, 0
        log_at, is_logged = start + patience(_LOG_AFTER), False
        while not self._store.check([f"{base}/result"]):
            now = self._now()
            if now >= deadline:
                self._close(base, len(known.ranks), self._round_failure(base, post, known))
                return
            if now >= start + _SCAN_AFTER:
                window = [others[(begin + i) % len(others)] for i in range(min(_WINDOW, len(others)))]
                begin += len(window)
                if any(self._place(r) not in (_NOWHERE, _Place(base, len(known.ranks))) for r in window):
                    # A rank of the component may have other meshes, so that it never joins this round.
                    self._close(base, len(known.ranks), _SEARCH)
                    return
            if now >= log_at:
                log_at = now + patience(_LOG_AFTER)
                missing = self._missing_in_round(base, known)
                if not is_logged:
                    is_logged = True
                    text = _describe_missing(missing, len(known.ranks), {self._rank: post.axes})
                    _log.warning("still waiting: %s", text)
                self._call(missing, known.ranks)
            self._clock.sleep(min(pause, deadline - now))
            pause = min(5 * pause, _MAX_PAUSE)

    def _end_round(self, base: str, result: dict[str, Any]) -> None:
        # The next round begins first, so that no rank joins this one after it has read the result.
        self._store.add(f"{base.rpartition('/')[0]}/round", 1)
        self._store.set(f"{base}/result", json.dumps(result))

    def _close(self, base: str, size: int, result: dict[str, Any]) -> None:
        """End a round that is not complete, with a result for the ranks in it.

        Any rank may do this. A round that is complete, or that another rank closes, stays as it is.
        """
        if self._store.add(f"{base}/closing", 1) > 1:
            return
        # One addition closes the round and shows whether it is complete, so that no round is both closed and complete.
        before = self._store.add(f"{base}/arrived", _CLOSED) - _CLOSED
        if before % _MAX_RANKS < size:
            self._end_round(base, result)

    def _round_failure(self, base: str, post: Post, known: Known) -> dict[str, Any]:
        return _failure(None, *to_wire(DisagreementError(self._describe_round(base, post, known))))

    def _describe_round(self, base: str, post: Post, known: Known) -> str:
        missing = self._missing_in_round(base, known)
        return _describe_missing(missing, len(known.ranks), {self._rank: post.axes})

    def _missing_in_round(self, base: str, known: Known) -> list[int]:
        here = _Place(base, len(known.ranks))
        return [r for r in known.ranks if self._place(r) != here]

    # ---- Stage 2: compare ----

    def _compare(self, base: str, arguments: str, known: Known, deadline: float) -> dict[str, Any]:
        """Compare the arguments of all ranks of a complete round, and return the result."""
        # The first rank that has these arguments writes them.
        if self._store.add(f"{base}/arguments/{zlib.crc32(arguments.encode())}", 1) == 1:
            number = self._store.add(f"{base}/num_texts", 1)
            self._store.set(f"{base}/text/{number}", json.dumps([self._rank, arguments]))
        if self._store.add(f"{base}/num_ready", 1) < len(known.ranks):
            return self._read(f"{base}/verdict", deadline)
        num_texts = self._store.add(f"{base}/num_texts", 0)
        texts = [json.loads(self._store.get(f"{base}/text/{i + 1}")) for i in range(num_texts)]
        result = _verdict({rank: json.loads(text) for rank, text in texts})
        self._store.set(f"{base}/verdict", json.dumps(result))
        return result

    # ---- Stage 3: search ----

    def _search(self, post: Post, deadline: float) -> dict[str, Any]:
        """Exchange groups until the whole component is known, and return the result."""
        self._store.set(self._at(self._rank), self._encode(post))
        result = None
        try:
            result = self._follow(post, deadline)
        finally:
            if result is None and self._claim(post.token):
                # This rank was interrupted. No rank publishes a result for its post from now on.
                self._store.set(self._at(self._rank), _WITHDRAWN)
        return result

    def _follow(self, post: Post, deadline: float) -> dict[str, Any]:
        """Wait for the result that the leader publishes, and lead meanwhile if it is this rank's turn.

        Args:
            post, deadline: those of this rank.
        """
        give_up_at, pause, since = deadline + _MARGIN, _FIRST_PAUSE, dict[str, float]()
        log_at, is_logged = self._now() + patience(_LOG_AFTER), False
        parts: dict[str, _Part] = {}
        num_messages = 0
        leader = lowest = min(post.neighbours)
        current = None
        if leader == self._rank:
            own = self._parse(self._encode(post))
            current = _Lead(post.token, leader, own.axes, "", set(post.neighbours), {leader}, log_at, deadline)
            parts[post.token] = _Part({leader: own}, "")
        while True:
            key = f"{post.token}/{num_messages + 1}"
            if self._store.check([key]):
                message = json.loads(self._store.get(key))
                num_messages += 1
                match message["do"]:
                    case "lead" if message["first"] <= lowest:
                        current, lowest = _Lead.decode(message, self._now()), message["first"]
                        current.deadline = min(current.deadline, deadline)
                        parts[current.search] = _Part({}, current.before)
                    case "lead":
                        pass  # The search of a lower rank includes this one.
                    case "withdraw":
                        self._withdraw(parts[message["search"]], message)
                    case kind:
                        if kind == "publish":
                            self._publish(parts[message["search"]], message)
                        # A rank that gives up leaves its claim, because another rank may have read its post.
                        for name in (f"claim/{post.token}", *(f"{post.token}/{i}" for i in range(num_messages + 1))):
                            self._store.delete_key(name)
                        result: dict[str, Any] = message["result"]
                        return self._read(result["key"], self._now() + _MARGIN) if "key" in result else result
                continue
            # This comes after the messages, because a message may end this search.
            if current is not None:
                lower = self._lead(current, post, parts[current.search], key)
                if lower is not None:
                    leader, current = lower, None
                    lowest = min(lowest, leader)
                continue
            now, place = self._now(), self._place(leader)
            if place.found is not None:
                # The leader reads the posts, and logs the missing ranks.
                if self._is_written(key, give_up_at):
                    continue
                now = self._now()
            if now >= give_up_at:
                missing = DisagreementError(_describe_missing([leader], len(post.neighbours), {self._rank: post.axes}))
                if self._claim(post.token):
                    self._store.set(self._at(self._rank), _WITHDRAWN)
                    return _failure(None, *to_wire(missing))
                give_up_at = now + _MARGIN
                if not self._is_written(key, give_up_at):
                    raise DisagreementError(_ENDED)
                continue
            self._send_to_search(place, since)
            if now >= log_at:
                log_at = now + patience(_LOG_AFTER)
                # Every rank that follows the missing one gets here. One of them logs it.
                if not is_logged and self._store.add(f"logged/{leader}/{place.round}", 1) == 1:
                    missing_text = _describe_missing([leader], len(post.neighbours), {self._rank: post.axes})
                    _log.warning("still waiting: %s", missing_text)
                is_logged = True
                self._call([leader], sorted(post.neighbours))
            self._clock.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    def _lead(self, lead: _Lead, post: Post, part: _Part, key: str) -> int | None:
        """Read posts until the component is complete, or pass the lead on.

        Args:
            lead: facts of the search.
            post: this rank's post.
            part: this rank's part of the search.
            key: key of the next message to this rank.

        Returns:
            The rank to follow: the first one of the search, or a lower rank of the component, which leads instead. None
            if there is a message to read first, after which this rank leads again.
        """
        known, posts = lead.known, part.posts
        expanded = {text for found in posts.values() for text in found.groups}
        missing, begin, width = sorted(known - lead.read), 0, _WINDOW
        pause, since = _FIRST_PAUSE / 10, dict[str, float]()
        while missing:
            if missing[0] < lead.first:
                return missing[0]
            if len(posts) >= _MAX_POSTS:
                # Another leader publishes, as below.
                if self._is_claimed(post):
                    return lead.first
                part.after = self._pass_on(lead, post, posts)
                return lead.first
            num_known, num_posts = len(known), len(posts)
            width = min(width, _MAX_POSTS - num_posts)
            for rank in missing[begin : begin + width]:
                place = self._place(rank)
                if place.found is None or not self._belongs(rank, place.found, lead.read):
                    self._send_to_search(place, since)
                    continue
                posts[rank] = place.found
                lead.read.add(rank)
                for text in {*place.found.groups} - expanded:
                    # Each group is expanded once, because thousands of ranks can share it.
                    expanded.add(text)
                    known |= self._ranks_of(text)
            if len(posts) > num_posts:
                if len(known) > num_known:
                    missing = sorted(known - lead.read)
                else:
                    missing = [rank for rank in missing if rank not in posts]
                # If all ranks are present, the width doubles, so that the list of missing ones is made only a few
                # times.
                width = 2 * width if len(posts) - num_posts >= width else _WINDOW
                pause, begin = _FIRST_PAUSE / 10, 0
                continue
            begin, width = begin + width, _WINDOW
            if self._store.check([key]):
                return None  # A lower rank, which this one has not reached yet, may have published.
            if (now := self._now()) >= lead.deadline:
                break
            if now >= lead.log_at:
                lead.log_at = now + patience(_LOG_AFTER)
                if not lead.is_logged:
                    _log.warning("still waiting: %s", self._describe_search(missing, known, posts, post))
                lead.is_logged = True
                self._call(missing, sorted(known))
            # The leader does not look for all missing ranks at once, which limits the number of messages per second.
            self._clock.sleep(pause)
            pause, begin = min(2 * pause, _GRACE), begin if begin < len(missing) else 0
        if self._is_claimed(post):
            # Another leader publishes. Ranks that it has reached may already have posted for their next call.
            return lead.first
        if missing:
            message = self._describe_search(missing, known, posts, post)
            result = _failure(None, *to_wire(DisagreementError(message)))
        else:
            self._add_up(lead, posts)
            result = self._result_of_search(lead)
        if len(_compact(result)) > 10 * _MAX_INLINE:
            # The messages contain only the key of a long result.
            key = f"result/{lead.search}"
            self._store.set(key, _compact(result))
            result = {"error": result["error"] and "in the result", "key": key}
        self._withdraw(part, {"search": lead.search, "result": result, "late": []})
        return lead.first

    def _pass_on(self, lead: _Lead, post: Post, posts: dict[int, _Found]) -> str:
        """Pass the lead on to a rank that has posted, and return its token."""
        self._add_up(lead, posts)
        # Any rank that has posted will do, because a rank waits for messages as long as its post exists.
        after = next(found.token for rank, found in reversed(posts.items()) if rank != self._rank)
        self._send(after, lead.encode(post.token, self._now()))
        return after

    def _add_up(self, lead: _Lead, posts: Mapping[int, _Found]) -> None:
        """Add the facts of posts to those of a search."""
        texts = {text for found in posts.values() for text, _, _ in found.axes}
        ranks_of = {text: self._ranks_in_order(text) for text in sorted(texts)}
        for rank, found in sorted(posts.items()):
            if found.error is not None and (lead.error is None or rank < lead.error[0]):
                lead.error = rank, *found.error
            lead.num_groups = max(lead.num_groups, found.num_groups)
            lead.num_reached.update(found.num_reached)
            lead.differs |= [name for _, name, _ in found.axes] != [name for _, name, _ in lead.axes]
            for i, (text, name, identity) in enumerate(found.axes):
                ranks = ranks_of[text]
                # The weights of all ranks along an axis add up to 0.
                weight = zero_sum_weight(0 if rank == ranks[0] else 1, len(ranks))
                lead.checksum += weight * zlib.crc32(repr((i, digest_of(ranks), name, identity)).encode())

    def _result_of_search(self, lead: _Lead) -> dict[str, Any]:
        """Return the result to publish: the lowest rank's error, a contradiction, or the component."""
        if lead.error is not None:
            return _failure(*lead.error)
        if lead.differs or lead.checksum:
            # The posts still exist. Only a search that fails reads them twice.
            places = {rank: self._place(rank) for rank in sorted(lead.read)}
            axes = {rank: self._axes_of(place.found) for rank, place in places.items() if place.found is not None}
            contradiction = axes_contradiction(axes)
            if contradiction is not None:
                return _failure(None, *to_wire(contradiction))
        is_mixed = any(num != len(lead.read) for num in lead.num_reached)
        return _success(tuple(sorted(lead.read)), lead.num_groups, is_mixed=is_mixed)

    def _withdraw(self, part: _Part, message: Mapping[str, Any]) -> None:
        """Remove the posts that this rank has read, and leave the others to the rank before it.

        All posts are withdrawn before any rank can leave, so that no post is mistaken for one of a later call.
        """
        # A rank that gives up and a rank that publishes both claim the post. Only the first claim counts.
        part.late = [rank for rank, found in part.posts.items() if not self._claim(found.token)]
        for rank in part.posts:
            if rank not in part.late:
                self._store.set(self._at(rank), _WITHDRAWN)
        late, result = [*message["late"], *part.late], message["result"]
        if part.before:
            # A few late ranks are enough for the message.
            self._send(
                part.before, {"do": "withdraw", "search": message["search"], "result": result, "late": late[:16]}
            )
            return
        if late and result["error"] is None:
            text = f"{rank_list(late)} waited for other ranks until the timeout. Make the call on every rank in time."
            result = _failure(None, *to_wire(DisagreementError(text)))
        self._publish(part, {"do": "publish", "search": message["search"], "result": result})

    def _publish(self, part: _Part, message: Mapping[str, Any]) -> None:
        """Send the result to the ranks whose posts this rank has read, the next leader last."""
        last = None
        for rank, found in part.posts.items():
            if found.token == part.after:
                last = found
            elif rank not in part.late:
                self._send(found.token, {"do": "end", "result": message["result"]})
        # The next leader publishes too, so it gets another message.
        if last is not None:
            self._send(last.token, message)

    def _send(self, token: str, message: Mapping[str, Any]) -> None:
        """Send a message to the rank of a post, which reads its messages in order."""
        number = self._store.add(f"{token}/0", 1)
        self._store.set(f"{token}/{number}", _compact(message))

    def _belongs(self, rank: int, found: _Found, posts: Collection[int]) -> bool:
        """Return whether a post belongs to this rendezvous, and not to another one that the rank joins first.

        As long as the post of a rank exists, the rank has not left the rendezvous of that post. So a rank whose post
        was read is in the same rendezvous if a path of posts leads to it.
        """
        chain, unread = {rank: found}, [found]
        while unread:
            one = unread.pop()
            groups = sorted(map(self._ranks_of, one.groups), key=len)
            if any(other in posts for ranks in groups for other in ranks):
                # The posts of the path were read one after another. They have all existed at the same time if none has
                # changed.
                return len(chain) == 1 or all(self._place(r).found == post for r, post in chain.items())
            for other in frozenset[int]().union(*groups) - chain.keys():
                if (next_one := self._place(other).found) is not None:
                    chain[other] = next_one
                    unread.append(next_one)
        return False

    def _send_to_search(self, place: _Place, since: dict[str, float]) -> None:
        """End a round of stage 1 that a rank of this rendezvous waits in.

        Args:
            place: rendezvous that the rank is in.
            since: time at which each round was first seen.
        """
        # This rank waits a moment, because the round may be one of an earlier call that is about to end.
        if place.round and self._now() >= since.setdefault(place.round, self._now()) + _GRACE:
            self._close(place.round, place.size, _SEARCH)

    def _is_claimed(self, post: Post) -> bool:
        return self._store.add(f"claim/{post.token}", 0) > 0

    def _claim(self, token: str) -> bool:
        return self._store.add(f"claim/{token}", 1) == 1

    def _describe_search(
        self, missing: Sequence[int], known: Collection[int], posts: Mapping[int, _Found], post: Post
    ) -> str:
        axes = {rank: self._axes_of(posts[rank]) for rank in sorted(posts)[:4]} or {self._rank: post.axes}
        return _describe_missing(missing, len(known), axes)

    # ---- Reading and writing ----

    def _at(self, rank: int) -> str:
        return f"at/{rank}"

    def _place(self, rank: int) -> _Place:
        """Return the rendezvous that a rank is in now."""
        # The key is checked first, because `Store.get` blocks on a key that was never set.
        text = self._store.get(self._at(rank)).decode() if self._store.check([self._at(rank)]) else _WITHDRAWN
        if text == _WITHDRAWN:
            return _NOWHERE
        if text.startswith("["):
            return _Place(found=self._parse(text))
        base, size = text.split()
        return _NOWHERE if self._store.check([f"{base}/result"]) else _Place(base, int(size))

    def _encode(self, post: Post) -> str:
        """Write a post as JSON."""
        groups = sorted({self._text_of(ranks) for ranks in post.groups})
        axes = [(self._text_of(axis.ranks), axis.name, axis.identity) for axis in post.axes]
        return _compact([post.token, groups, axes, post.num_groups, post.error, post.num_reached])

    def _parse(self, text: str) -> _Found:
        token, groups, axes, num_groups, error, num_reached = json.loads(text)
        error = None if error is None else tuple(error)
        return _Found(token, tuple(groups), tuple(map(tuple, axes)), num_groups, error, tuple(num_reached))

    def _text_of(self, ranks: Ranks) -> str:
        """Return the ranks of a group as text, or the digest under which a rank has written the text."""
        text = encode_ranks(ranks)
        if len(text) <= _MAX_INLINE:
            return text
        digest = f"#{digest_of(ranks)}"
        if self._store.add(f"group/{digest}/num_posts", 1) == 1:
            self._store.set(f"group/{digest}", text)
        return digest

    def _ranks_in_order(self, text: str) -> Ranks:
        return decode_ranks(self._store.get(f"group/{text}").decode() if text.startswith("#") else text)

    def _ranks_of(self, text: str) -> frozenset[int]:
        if text not in self._groups:
            self._groups[text] = frozenset(self._ranks_in_order(text))
        return self._groups[text]

    def _axes_of(self, found: _Found) -> tuple[Axis, ...]:
        return tuple(Axis(self._ranks_in_order(text), name, identity) for text, name, identity in found.axes)

    def _is_written(self, key: str, until: float) -> bool:
        """Wait until a key has a value, and return whether it has one."""
        try:
            self._store.wait([key], timedelta(seconds=max(0.001, until - self._now())))
        except RuntimeError:
            return self._store.check([key])
        return True

    def _read(self, key: str, until: float) -> dict[str, Any]:
        """Read a result that another rank is about to write."""
        if not self._is_written(key, until):
            raise DisagreementError(_ENDED)
        result: dict[str, Any] = json.loads(self._store.get(key))
        return result


def derive_component(groups: Iterable[Ranks], axes: Sequence[Axis], rank: int, num_ranks: int) -> Known | None:
    """Derive the whole component of a rank from its meshes and axes, if they allow it.

    The result holds if the other ranks have meshes along the same dims. The rendezvous finds out whether they do.

    Args:
        groups: rank groups of the layouts, each ascending.
        axes: axes of `split_over=`.
        rank: global rank of this process.
        num_ranks: number of ranks in the job.

    Returns:
        The component, or None if this rank cannot derive it.
    """
    groups = list(groups)
    if not groups and not axes:
        return None
    spans = [*groups, *(ascending(axis.ranks) for axis in axes)]
    component, text = max(spans, key=len), ""
    if axes or not all(map(frozenset(component).issuperset, spans)):
        grids = grid_of_lines(rank, spans), axes[0].grid if axes else None
        in_grids = (_derive_in_grid(grid, groups, axes, rank) for grid in grids if grid is not None)
        found = next((one for one in in_grids if one is not None), None)
        if found is None:
            return None
        component, text = found
    # A rank without a layout cannot tell whether other ranks have meshes within a stage.
    return Known(component, text) if groups or len(component) == num_ranks else None


def _derive_in_grid(grid: Grid, groups: Sequence[Ranks], axes: Sequence[Axis], rank: int) -> tuple[Ranks, str] | None:
    """Return the component along the dims of a grid that groups and axes span, and a text about the axes."""
    # All ranks of a grid have the same lines along the same dims, so axes along the same dims cannot contradict each
    # other.
    along = [grid.dims_of(rank, axis.ranks) for axis in axes]
    dims = [*along, *(grid.dims_of(rank, span) for span in groups)]
    if any(one is None for one in dims):
        return None
    component = grid.slice_of(rank, sorted({dim for one in dims if one is not None for dim in one}))
    return component, repr((grid.digest, [axis.name for axis in axes], along)) if axes else ""


def _verdict(arguments: Mapping[int, Sequence[Any]]) -> dict[str, Any]:
    """Return the result of a comparison: the lowest rank's error, a search, or the component.

    Args:
        arguments: `Post.arguments` by the first rank that has them.
    """
    # An error is more useful than the disagreement that may follow from it.
    for rank, (*_, error) in sorted(arguments.items()):
        if error is not None:
            return _failure(rank, *error)
    if len({axes for axes, *_ in arguments.values()}) > 1:
        return _SEARCH  # A search finds the axes that contradict each other.
    num_groups = max(num for _, num, _, _ in arguments.values())
    return _success(None, num_groups, is_mixed=any(is_mixed for _, _, is_mixed, _ in arguments.values()))


def _describe_missing(missing: Sequence[int], num_ranks: int, axes: Mapping[int, tuple[Axis, ...]]) -> str:
    """Describe the ranks that have not called, for logs and errors.

    Args:
        missing: the ranks.
        num_ranks: number of ranks that must call, as far as it is known.
        axes: axes of a few ranks that have called, by rank.
    """
    return (
        f"{len(missing)} of {num_ranks} ranks ({rank_list(missing)}) have not made this call, and share a mesh or an "
        f"axis of split_over= with others: {describe_axes(axes, sorted(axes))}. Make the call on every rank that "
        "shares one, with the same split_over=."
    )
