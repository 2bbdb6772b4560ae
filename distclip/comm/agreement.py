"""How ranks that know only their neighbours find out who takes part in a call, before the first collective.

A rank knows the meshes of its own parameters and the axes of its own `split_over=`. A pipeline stage does not know the
mesh of the next stage, and a rank without parameters knows none. So every rank lays down what it knows in the key-value
store of torch.distributed and reads what the ranks it has heard of laid down, until it has heard of no new one. That is
the whole connected component, the same on each of its ranks; ranks of another model are neither asked nor waited for.
It happens once per `split_over=` (or per set of meshes) and not per step. No collective is used, so what a rank
finds wrong with its arguments, and any disagreement, is read by all of them instead of hanging some.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import Store

from ..errors import DisagreementError, as_peer
from ..shards import Axis, Ranks

__all__ = ["Meeting", "Post", "check"]

T = TypeVar("T")

_log = logging.getLogger("distclip")

_PATIENCE = 20.0
"""Seconds after which a rank says whom it is waiting for."""

_GRACE = 5.0
"""Seconds that a rank which will raise waits for the others to have read why."""


@dataclass(frozen=True, slots=True)
class Post:
    """What one rank says of a call.

    Args:
        groups: rank groups of its parameters' meshes and of its axes.
        axes: its `split_over=`.
        named: the process groups it has, as (name, ranks): candidates to carry the reduction.
        pg_count: how many process groups it belongs to.
        failure: (class name, message) of what it found wrong with its arguments.
        heard: every rank it has heard of by now, through other ranks too.
        token: unique to the call.
    """

    groups: tuple[Ranks, ...]
    axes: tuple[Axis, ...]
    named: tuple[tuple[str, Ranks], ...] = ()
    pg_count: int = 0
    failure: tuple[str, str] | None = None
    heard: Ranks = ()
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def reach(self) -> frozenset[int]:
        """Every rank this one has heard of."""
        return frozenset(rank for ranks in (*self.groups, self.heard) for rank in ranks)

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str | bytes) -> Post:
        """From JSON."""
        raw = json.loads(text)
        return Post(
            groups=tuple(tuple(ranks) for ranks in raw["groups"]),
            axes=tuple(Axis(tuple(a["ranks"]), a["name"], a["identity"]) for a in raw["axes"]),
            named=tuple((name, tuple(ranks)) for name, ranks in raw["named"]),
            pg_count=raw["pg_count"],
            failure=None if raw["failure"] is None else tuple(raw["failure"]),
            heard=tuple(raw["heard"]),
            token=raw["token"],
        )


class Meeting:
    """One rank's place in the exchange, for as long as the store lives.

    Args:
        store: a store that all ranks share, used by nothing else under its prefix.
        rank: this global rank.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._done: set[str] = set()

    def agree(self, post: Post, timeout: timedelta) -> dict[int, Post]:
        """Exchange posts with everyone reachable from this rank.

        Args:
            post: what this rank says.
            timeout: how long to wait for a rank that never comes.

        Returns:
            The post of every rank of the component, this one's among them, the same on all of them.

        Raises:
            DisagreementError: a rank did not come, or the ranks' axes contradict each other; everyone who can be
                reached raises it too.
            DistclipError: what some rank found wrong with its own arguments.

        Collectives: none. Host syncs: none (a store on the host is read).
        """
        deadline = time.monotonic() + timeout.total_seconds()
        self._store.set(str(self._rank), post.encode())
        posts = {self._rank: post}
        try:
            while _reach(posts) - posts.keys():
                posts.update(self._await(posts, deadline))
                told = replace(post, heard=tuple(sorted(_reach(posts))))
                self._store.set(str(self._rank), told.encode())
            verdict = _first_failure(posts) or check(posts)
            self._leave(posts, deadline if verdict is None else time.monotonic() + _GRACE)
        finally:
            self._store.delete_key(str(self._rank))
        if verdict is not None:
            raise verdict
        return posts

    def _await(self, posts: Mapping[int, Post], deadline: float) -> dict[int, Post]:
        """Posts of ranks that were heard of but not read, as soon as there is one."""
        reach = _reach(posts)
        missing = sorted(reach - posts.keys())

        def look() -> dict[int, Post] | None:
            there = {
                peer: Post.decode(self._store.get(str(peer))) for peer in missing if self._store.check([str(peer)])
            }
            # A rank may still be busy with another call: in this one it has heard of somebody here besides itself.
            ours = {
                peer: post
                for peer, post in there.items()
                if post.token not in self._done and post.reach & (reach - {peer})
            }
            return ours or None

        found = _poll(look, min(deadline, time.monotonic() + _PATIENCE))
        if found is None:
            said = ", ".join(f"rank {r} passed {_said(p)}" for r, p in sorted(posts.items()))
            absent = (
                f"rank(s) {missing} share a mesh or an axis of split_over= with {said}, and have not come to this "
                "call. Every rank concerned must make the call, with the same split_over=."
            )
            _log.warning("still waiting: %s", absent)
            found = _poll(look, deadline)
            if found is None:
                raise DisagreementError(absent)
        return found

    def _leave(self, posts: Mapping[int, Post], deadline: float) -> None:
        """Wait until every rank has read every post: only then may a post be taken away."""
        tokens = sorted(post.token for post in posts.values())
        # A rank that is quicker than this one may come back before the others have taken theirs away.
        self._done.update(tokens)
        key = hashlib.sha1("".join(tokens).encode(), usedforsecurity=False).hexdigest()
        if self._store.add(key, 1) == len(posts):
            self._store.set(f"{key}/all", "1")
        _poll(lambda: self._store.check([f"{key}/all"]) or None, deadline)


def check(posts: Mapping[int, Post]) -> DisagreementError | None:
    """The contradiction between what the ranks say of `split_over=`, if there is one.

    >>> a, b = Post(((0, 1),), (Axis((0, 1), "pp"),)), Post(((0, 1),), ())
    >>> print(check({0: a, 1: b}))
    split_over= differs between the ranks of one call: rank 0 passed [pp over ranks [0, 1]], rank 1 passed None. \
Every rank must pass the same axes of the same mesh, through itself.
    """

    def clash(one: int, two: int) -> DisagreementError:
        return DisagreementError(
            f"split_over= differs between the ranks of one call: rank {one} passed {_said(posts[one])}, "
            f"rank {two} passed {_said(posts[two])}. "
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


def _first_failure(posts: Mapping[int, Post]) -> Exception | None:
    """What the lowest failing rank ran into, for all of them; a rank's own failure is raised by its caller."""
    for rank, post in sorted(posts.items()):
        if post.failure is not None:
            return as_peer(rank, *post.failure)
    return None


def _poll(look: Callable[[], T | None], deadline: float) -> T | None:
    """`look()` until it finds something: at once where ranks run in step, a hundred times a second later on."""
    pause = 0.0002
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return found


def _reach(posts: Mapping[int, Post]) -> frozenset[int]:
    return frozenset[int]().union(*(post.reach for post in posts.values()))


def _said(post: Post) -> str:
    return f"[{', '.join(map(str, post.axes))}]" if post.axes else "None"
