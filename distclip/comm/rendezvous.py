"""How ranks that know only their neighbours find out who takes part in a call, before the first collective.

A rank knows the meshes of its own parameters and the axes of its own `split_over=`. A pipeline stage does not know the
mesh of the next stage, and a rank without parameters knows none. So every rank lays down what it knows in the key-value
store of torch.distributed; whoever is the lowest of all the ranks it has heard of reads what those laid down, follows
their neighbours until it has heard of no new one, and tells all of them. That is the whole connected component; ranks
of another model are neither asked nor waited for. It happens once per `split_over=` (or set of meshes) and costs a few
messages per rank. No collective is used, so what a rank finds wrong with its arguments, and any
disagreement, reaches all of them instead of hanging some.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from ..errors import DisagreementError, from_wire, to_wire
from .ranks import Axis, Ranks

__all__ = ["Agreement", "Meeting", "Post", "check", "key"]

T = TypeVar("T")

_log = logging.getLogger("distclip")

_NOTHING = b"-"
"""In place of a post that was taken away: a store blocks who asks for a key that is gone."""

_PATIENCE = 20.0
"""Seconds after which a rank says whom it is waiting for."""


@dataclass(frozen=True, slots=True)
class Post:
    """What one rank says of a call.

    Args:
        groups: rank groups of its parameters' meshes and of its axes.
        axes: its `split_over=`.
        named: names of the process groups it has, by the `key` of their ranks: candidates to carry the reduction.
        pg_count: how many process groups it belongs to.
        failure: (class name, message) of what it found wrong with its arguments.
        token: unique to the call.
    """

    groups: tuple[Ranks, ...]
    axes: tuple[Axis, ...]
    named: dict[str, list[str]] = field(default_factory=dict)
    pg_count: int = 0
    failure: tuple[str, str] | None = None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def reach(self) -> frozenset[int]:
        """Every rank this one has heard of."""
        return frozenset(rank for ranks in self.groups for rank in ranks)

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str | bytes) -> Post:
        """From JSON."""
        raw = json.loads(text)
        raw["groups"] = tuple(map(tuple, raw["groups"]))
        raw["axes"] = tuple(Axis(tuple(a["ranks"]), a["name"], a["identity"]) for a in raw["axes"])
        raw["failure"] = None if raw["failure"] is None else tuple(raw["failure"])
        return Post(**raw)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks of a component are told.

    Args:
        ranks: of the component, ascending.
        group: the name of a process group of exactly those ranks that all of them have; None if there is none.
        pg_count: the largest number of process groups that any of them belongs to.
    """

    ranks: Ranks
    group: str | None
    pg_count: int


class Meeting:
    """One rank's place in the exchange.

    Args:
        store: a store that all ranks share, used by nothing else under its prefix.
        rank: this global rank.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank

    def agree(self, post: Post, timeout: timedelta) -> Agreement:
        """Find everyone reachable from this rank.

        Args:
            post: what this rank says.
            timeout: how long to wait for a rank that never comes.

        Raises:
            DisagreementError: a rank did not come, or the ranks' axes contradict each other; on all that came.
            DistclipError: what some rank found wrong with its own arguments; likewise.

        Collectives: none. Host syncs: none (a store on the host is read).
        """
        deadline = time.monotonic() + timeout.total_seconds()
        self._store.set(str(self._rank), post.encode())
        try:
            if self._rank == min(post.reach):
                self._lead(post, deadline)
            # The leader gives up first, and then says why.
            leader = [min(post.reach)]
            told = _wait(lambda: self._told(post), deadline + _PATIENCE, lambda: _absent(leader, {self._rank: post}))
        finally:
            self._store.set(str(self._rank), _NOTHING.decode())
            self._store.delete_key(post.token)
        if told is None:
            raise DisagreementError(_absent(leader, {self._rank: post}))
        if told["failure"] is not None:
            raise from_wire(*told["failure"])
        return Agreement(tuple(told["ranks"]), told["group"], told["pg_count"])

    def _lead(self, post: Post, deadline: float) -> None:
        """Read posts until all ranks heard of are read, then tell each; unless another leader was quicker."""
        posts, failure = {self._rank: post}, None
        while missing := sorted(_reach(posts) - posts.keys()):
            found = _wait(partial(self._read, missing, posts), deadline, partial(_absent, missing, posts))
            if not found:
                failure = None if found == {} else DisagreementError(_absent(missing, posts))
                break
            posts.update(found)
        # Looked at after the last post was read: whoever was told by another leader may have posted for its next call.
        if self._told(post) is None:
            self._tell(posts, failure)

    def _read(self, missing: list[int], posts: Mapping[int, Post]) -> dict[int, Post] | None:
        """Posts of this call by ranks that were heard of; an empty dict if another leader has told this one."""
        if self._told(posts[self._rank]) is not None:
            return {}
        here = _reach(posts)
        there = {peer: post for peer in missing if (post := self._post_of(peer)) is not None}
        return {peer: post for peer, post in there.items() if self._linked(post, here - {peer})} or None

    def _linked(self, post: Post, here: frozenset[int]) -> bool:
        """Whether a post is of this call: a rank may be busy with another one, whose ranks know of nobody here."""
        heard, followed = post.reach, frozenset[int]()
        while not heard & here and (more := heard - followed):
            followed |= more
            heard |= frozenset[int]().union(*(p.reach for p in map(self._post_of, more) if p is not None))
        return bool(heard & here)

    def _post_of(self, rank: int) -> Post | None:
        text = self._store.get(str(rank)) if self._store.check([str(rank)]) else _NOTHING
        return None if text == _NOTHING else Post.decode(text)

    def _tell(self, posts: Mapping[int, Post], failure: Exception | None) -> None:
        """Take the posts away, then tell: other leaders first, so that none of them acts on a post of the next call."""
        if self._store.add(key(post.token for post in posts.values()), 1) > 1:
            return  # Another leader is telling the same.
        for rank in posts:
            self._store.set(str(rank), _NOTHING.decode())
        told = _answer(posts) if failure is None else _failed(None, *to_wire(failure))
        for _, post in sorted(posts.items(), key=lambda item: item[0] != min(item[1].reach)):
            self._store.set(post.token, json.dumps(told))

    def _told(self, post: Post) -> dict[str, Any] | None:
        """What a leader has told this rank by now."""
        if not self._store.check([post.token]):
            return None
        told: dict[str, Any] = json.loads(self._store.get(post.token))
        return told


def check(posts: Mapping[int, Post]) -> DisagreementError | None:
    """The contradiction between what the ranks say of `split_over=`, if there is one.

    >>> a, b = Post(((0, 1),), (Axis((0, 1), "pp"),)), Post(((0, 1),), ())
    >>> print(check({0: a, 1: b}))
    split_over= differs between the ranks of one call: rank 0 passed [pp over ranks [0, 1]], rank 1 passed None. \
Every rank must pass the same axes of the same mesh, through itself.
    """

    def clash(one: int, two: int) -> DisagreementError:
        return DisagreementError(
            f"split_over= differs between the ranks of one call: {_said(posts, [one, two])}. "
            "Every rank must pass the same axes of the same mesh, through itself."
        )

    first = min(posts)
    for rank, post in sorted(posts.items()):
        if [axis.name for axis in post.axes] != [axis.name for axis in posts[first].axes]:
            return clash(first, rank)
        for i, axis in enumerate(post.axes):
            for other in axis.ranks:
                if other in posts and posts[other].axes[i : i + 1] != (axis,):
                    return clash(rank, other)
    return None


def _answer(posts: Mapping[int, Post]) -> dict[str, Any]:
    """What to tell the ranks of a component: the lowest one's failure, a disagreement, or who they are."""
    for rank, post in sorted(posts.items()):
        if post.failure is not None:
            return _failed(rank, *post.failure)
    if (clash := check(posts)) is not None:
        return _failed(None, *to_wire(clash))
    ranks = sorted(posts)
    names = [set(post.named.get(key(ranks), ())) for post in posts.values()]
    common = set.intersection(*names)
    return {
        "failure": None,
        "ranks": ranks,
        "group": min(common, default=None),
        "pg_count": max(post.pg_count for post in posts.values()),
    }


def _failed(rank: int | None, kind: str, message: str) -> dict[str, Any]:
    return {"failure": (rank, kind, message)}


def key(members: Iterable[int] | Iterable[str]) -> str:
    """A short name for a set of ranks, or of tokens."""
    return hashlib.sha1(repr(sorted(members)).encode(), usedforsecurity=False).hexdigest()[:16]


def _wait(look: Callable[[], T | None], deadline: float, absent: Callable[[], str]) -> T | None:
    """`look()` until it finds something: at once where ranks run in step, ever more rarely later on."""
    pause, patience = 0.0002, time.monotonic() + _PATIENCE
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        if time.monotonic() > patience:
            _log.warning("still waiting: %s", absent())
            patience = math.inf
    return found


def _absent(missing: Sequence[int], posts: Mapping[int, Post]) -> str:
    return (
        f"rank(s) {list(missing)} share a mesh or an axis of split_over= with {_said(posts, sorted(posts))}, and have "
        "not come to this call. Every rank concerned must make the call, with the same split_over=."
    )


def _said(posts: Mapping[int, Post], ranks: Sequence[int]) -> str:
    told = [(r, ", ".join(map(str, posts[r].axes))) for r in ranks]
    return ", ".join(f"rank {r} passed {f'[{axes}]' if axes else None}" for r, axes in told)


def _reach(posts: Mapping[int, Post]) -> frozenset[int]:
    return frozenset[int]().union(*(post.reach for post in posts.values()))
