"""Find out which ranks have made a recorder, without a collective that a rank without one would not enter."""

from __future__ import annotations

import json
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from ..clipper import GradClipper
from ..comm import global_ranks
from ..comm.discovery import job_store

__all__ = ["Entry", "Roster"]

_made: weakref.WeakKeyDictionary[GradClipper, Counter[str]] = weakref.WeakKeyDictionary()
"""Number of rosters of each clipper on this rank, by their purpose and by the number of steps before them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry of one rank.

    Args:
        options: arguments that must be equal on all ranks.
        error: (class name, message) of the rank's error, or None.
    """

    options: Any
    error: Any = None


class Roster:
    """List of the ranks that make or flush a recorder after the same step.

    Each rank adds its entry to the store of torch.distributed, and reads the entries of the others there. Once a rank
    has the result of a later step, every rank has entered that step. By then, all ranks that made the recorder before
    it are listed.

    Args:
        clipper: clipper of the recorder.
        entry: entry of this rank.
        purpose: name of the common action of the ranks.

    Collectives: none, or one gather if the ranks have no store (MPI alone, threads).
    """

    def __init__(self, clipper: GradClipper, entry: Entry, purpose: str = "recorder") -> None:
        comm, made = clipper.comm, _made.setdefault(clipper, Counter())
        name = f"{purpose} after {clipper.steps} steps"
        self.name = f"{name} ({made[name]})"
        made[name] += 1
        self._ranks, store = global_ranks(comm), job_store(comm)
        self._entries: dict[int, Entry] = {self._ranks[comm.rank]: entry}
        self._store: PrefixStore | None = None
        self._store_of_clipper = None if store is None else PrefixStore(f"recorder/{clipper.token}", store)
        if comm.size > 1 and store is None:
            self._entries = dict(zip(self._ranks, comm.gather_objects(entry), strict=True))
        elif comm.size > 1 and self._store_of_clipper is not None:
            self._store = PrefixStore(self.name, self._store_of_clipper)
            self._store.set(str(self._ranks[comm.rank]), json.dumps([entry.options, entry.error]))
            self._store.add("count", 1)

    def is_complete(self, patience: float = 0.0) -> bool:
        """Return whether every rank is listed.

        Args:
            patience: seconds to wait for missing ranks.
        """
        end, pause = time.monotonic() + patience, 0.005
        while len(self._entries) < len(self._ranks) and self._store is not None:
            if self._store.add("count", 0) == len(self._ranks):
                self.entries()
            elif time.monotonic() < end:
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            else:
                break
        return len(self._entries) == len(self._ranks)

    def entries(self) -> dict[int, Entry]:
        """Return the entries so far, by global rank in ascending order."""
        for rank in self._ranks:
            if rank not in self._entries and self._store is not None and self._store.check([str(rank)]):
                options, error = json.loads(self._store.get(str(rank)))
                self._entries[rank] = Entry(tuple(options) if options is not None else None, error)
        return dict(sorted(self._entries.items()))

    def claim_file(self) -> bool:
        """Return whether this is the first rank that claims to write the file of the clipper."""
        return self._store_of_clipper is None or self._store_of_clipper.add("claims", 1) == 1

    def decide(self, value: bool) -> bool:
        """Return the value of the rank that calls this first. All listed ranks call it."""
        if self._store is None:
            return value
        if self._store.add("deciders", 1) == 1:
            self._store.set("decision", str(int(value)))
        return self._store.get("decision") == b"1"
