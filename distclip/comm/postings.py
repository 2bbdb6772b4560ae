"""Compare a value with other ranks through the store of torch.distributed, without a collective and without waiting.

The first rank that posts sets the value that all later ones compare with. A rank that differs posts why, so that the
first rank can read it in a later call. Each rank exchanges a few messages, however many ranks there are.
"""

from __future__ import annotations

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from .discovery import memory_of, posting_store
from .local import LocalComm

__all__ = ["Posting", "posting_of"]

_MAX_CALLS = 64
"""Number of calls after which a comparison ends."""


class Posting:
    """Comparison of one value between ranks.

    Args:
        store: store that the ranks share.
        name: name of the value. Ranks with different names do not compare.
        rank: global rank of this process.
        size: number of ranks that may compare.

    Attributes:
        is_settled: whether nothing is left to compare.
        num_calls: number of calls so far, see `begin_call`.
        other: the first rank that posted and what it posted. None if it is this rank, or before `post`.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int) -> None:
        self._store, self.name, self.rank, self._size = store, name, rank, size
        self.num_calls, self.is_settled = 0, False
        self.other: tuple[int, str] | None = None
        self._entries: set[str] = set()

    def begin_call(self) -> bool:
        """Count a call, and return whether it is one that reads what later ranks have posted: 2, 4, 8 ... 64."""
        self.num_calls += 1
        if self.num_calls > _MAX_CALLS:
            self.is_settled = True
        return not self.is_settled and self.num_calls > 1 and self.num_calls & (self.num_calls - 1) == 0

    def post(self, value: str) -> tuple[int, str] | None:
        """Post a value, and return the rank and the value that came first, or None if it is this rank."""
        own = f"{self.rank}:{value}"
        rank, _, first = self._store.compare_set(self.name, "", own).decode().partition(":")
        self.other = None if int(rank) == self.rank else (int(rank), first)
        return self.other

    def list_entry(self, entry: str) -> bool:
        """List an entry of this rank, and return whether it was listed already."""
        if entry in self._entries:
            return True
        self._entries.add(entry)
        self._store.set(f"{self.name}/{self.rank}/{entry}", "")
        return False

    def has_entry(self, rank: int, entry: str) -> bool:
        """Return whether a rank has listed an entry."""
        return bool(self._store.check([f"{self.name}/{rank}/{entry}"]))

    def settle_equal(self) -> None:
        """End the comparison of this rank, because it agrees with the first one."""
        self._store.add(f"{self.name}/equal", 1)
        self.is_settled = True

    def settle_different(self, text: str) -> None:
        """End the comparison of this rank, and post how it differs."""
        self._store.set(f"{self.name}/different", text)
        self.is_settled = True

    def read_difference(self) -> str | None:
        """Return how a later rank differs, if one has posted it.

        The comparison ends in that case, or once all ranks have answered.
        """
        if self._store.check([f"{self.name}/different"]):
            self.is_settled = True
            return self._store.get(f"{self.name}/different").decode()
        self.is_settled = self._store.add(f"{self.name}/equal", 0) == self._size - 1
        return None


def posting_of(name: str, size: int | None = None) -> Posting | None:
    """Return the comparison of a name, which all calls of this rank share.

    Args:
        name: equal on all ranks.
        size: number of ranks that may compare. None for all ranks of the job.

    Returns:
        None if this process is the only one.
    """
    postings: dict[str, Posting | None] = memory_of(LocalComm()).setdefault("postings", {})
    if name not in postings:
        store = posting_store()
        postings[name] = None if store is None else Posting(store, name, dist.get_rank(), size or dist.get_world_size())
    return postings[name]
