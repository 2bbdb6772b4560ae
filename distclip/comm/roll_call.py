"""Find out which ranks of the job call a function that is meant for all, without waiting long for the others.

The ranks that share a mesh or an axis must all call, as in a rendezvous. A job can also have ranks that take no part in
the model. The call waits for those ranks only for a while, so that a call of all ranks can compare all of them, and a
call of some ranks still returns.
"""

from __future__ import annotations

import base64
import json
import pickle
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d

from ..errors import DisagreementError
from .discovery import world_comm
from .ranks import Ranks
from .waiting import end_waits_of

__all__ = ["Roster", "call_roll", "components"]


@dataclass(frozen=True, slots=True)
class Roster:
    """Ranks that take part in one call.

    Args:
        ranks: global ranks that call, ascending.
        absent: global ranks of the job that do not.
        gather: function that returns the values of all ranks that call, in the order of `ranks`. One gather.
    """

    ranks: Ranks
    absent: Ranks
    gather: Callable[[Any], list[Any]]


def call_roll(spans: Collection[Ranks], patience: float) -> Roster:
    """Find the ranks that make this call.

    Args:
        spans: ranks of each mesh and axis of this rank, all of which must call.
        patience: seconds to wait for the other ranks of the job.

    Returns:
        The ranks, equal on all of them.

    Raises:
        DisagreementError: a rank of `spans` did not call within the timeout of the process group, or waits for this
            rank in another call.

    Collectives: none, only messages through the store of torch.distributed.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = PrefixStore("distclip/roll", distributed_c10d._get_default_store())
    start = time.monotonic()
    timeout: timedelta = distributed_c10d._get_default_store().timeout  # type: ignore[attr-defined]
    deadline = start + timeout.total_seconds()
    while True:
        # A round is closed by one rank, which opens the next round first. So a rank that comes too late for a round,
        # or that calls again, never reads a message of the wrong round.
        number = store.add("round", 0)
        store.set(f"{number}/{rank}", json.dumps(sorted({r for ranks in spans for r in ranks})))
        ranks = _wait_for_round(store, number, rank, size, start + patience, deadline)
        if rank in ranks:
            break
    absent = tuple(r for r in range(size) if r not in ranks)
    if not absent:
        return Roster(ranks, (), world_comm().gather_objects)

    def gather(value: Any) -> list[Any]:
        # These ranks may share no process group, and a new one for them would stay for the life of the job.
        store.set(f"{number}/value/{rank}", base64.b64encode(pickle.dumps(value)).decode())
        return [pickle.loads(base64.b64decode(store.get(f"{number}/value/{r}"))) for r in ranks]

    return Roster(ranks, absent, gather)


def components(ranks: Iterable[int], spans: Mapping[int, Collection[Ranks]]) -> dict[int, Ranks]:
    """Return the connected component of each rank: the ranks over which one norm is computed.

    Args:
        ranks: global ranks.
        spans: for each of them, the ranks of its meshes and axes.

    >>> components([0, 1, 2, 3], {0: [(0, 1)], 1: [(0, 1)], 2: [(2, 1)], 3: []})
    {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2), 3: (3,)}
    """
    root = {rank: rank for rank in ranks}

    def find(rank: int) -> int:
        while root[rank] != rank:
            root[rank] = rank = root[root[rank]]
        return rank

    for rank in root:
        for other in (other for span in spans[rank] for other in span if other in root):
            # The lower root wins, so that the result does not depend on the order.
            low, high = sorted((find(rank), find(other)))
            root[high] = low
    members: dict[int, list[int]] = {}
    for rank in sorted(root):
        members.setdefault(find(rank), []).append(rank)
    return {rank: tuple(members[find(rank)]) for rank in root}


def _wait_for_round(store: Store, number: int, rank: int, size: int, patient_until: float, deadline: float) -> Ranks:
    """Wait until a round is closed, by this rank or another one, and return its ranks."""
    posts: dict[int, list[int]] = {}
    pause = 0.0005
    while not store.check([f"{number}/roster"]):
        posts |= {
            r: json.loads(store.get(f"{number}/{r}"))
            for r in range(size)
            if r not in posts and store.check([f"{number}/{r}"])
        }
        needed = {r for post in posts.values() for r in post}
        late = sorted(needed - posts.keys())
        if late and time.monotonic() > patient_until and (waiting := end_waits_of(late)):
            calls = " ".join(f"Rank {one} waits in {call}." for one, call in waiting.items())
            raise DisagreementError(
                f"rank(s) {late} share a mesh or an axis of split_over= with this one, and make another call. {calls} "
                "Make the same calls on every rank."
            )
        if late and time.monotonic() > deadline:
            raise DisagreementError(
                f"rank(s) {late} share a mesh or an axis of split_over= with this one, and have not made this call. "
                "Make the call on every rank that shares one."
            )
        is_complete = len(posts) == size or (not late and time.monotonic() > patient_until)
        if is_complete and store.add(f"{number}/closing", 1) == 1:
            store.add("round", 1)
            store.set(f"{number}/roster", json.dumps(sorted(posts)))
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return tuple(json.loads(store.get(f"{number}/roster")))
