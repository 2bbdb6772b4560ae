"""Find out which ranks are missing in a collective that does not end, and whether it can end at all.

A rank that has waited for a while writes to the store which collective it waits in. One rank of the collective logs the
ranks that have not written the same.

Ranks that wait for each other in two collectives would never stop waiting. For example, one rank alone has a parameter
on a wider mesh and waits for all ranks, while its peers wait for it in a collective of fewer ranks. The ranks of the
smaller group then notify it through the store. It leaves the larger group for good, and raises together with them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d

from .ranks import Ranks, decode_ranks, encode_ranks, rank_list

__all__ = [
    "Meetings",
    "call_to_first_call",
    "end_waits_of",
    "is_left",
    "log_missing",
    "meetings_of",
    "note_left_groups",
    "patience",
    "present_call",
    "ranks_of_first_call",
]

_log = logging.getLogger("distclip")

_GRACE = 2.0
"""Seconds between the first and the last rank that runs out of patience."""

_NUM_LOOKS = 12
"""Number of times that a waiting rank checks the store. Each pause is twice the last: more than two hours in all."""

_SOON = 0.5
"""Seconds within which the peers of a failed rank fail too, usually because connections are closed."""

_MAX_READ = 64
"""Number of ranks whose failed calls are read."""

_DECORATORS = ("call", "wrapper")
"""Names of functions that decorators of distclip put around others."""

_FIRST_CALL = "first call of "

_MAX_CALLED = 8
"""Number of missing ranks that a waiting rank looks for in other collectives."""


class Meetings:
    """Collectives of one process group, in the order in which this rank enters them.

    Args:
        name: name of the group, equal on all of its ranks and different from that of other groups.
        ranks: global ranks of the group.
        here: global rank of this process.

    Attributes:
        num_entered: number of collectives that this rank has entered.
        is_left: whether this rank has left the group, or has found that another rank has. Then it enters no more
            collectives of the group.
    """

    def __init__(self, name: str, ranks: Ranks, here: int) -> None:
        self.name, self.ranks, self.here = name, ranks, here
        self.num_entered, self.is_left = 0, False

    def wait(self, kind: str, number: int, has_ended: Callable[[float], bool], *, may_leave: bool) -> str | None:
        """Wait for a collective that has taken long, and log which ranks are missing.

        Args:
            kind: name of the collective, for the log.
            number: 1-based index of the collective.
            has_ended: waits for some seconds, and returns whether the collective has ended.
            may_leave: whether the rank may leave the group.

        Returns:
            None once the collective has ended, or after many checks. Otherwise this rank has left the group. The result
            is then the name of a group whose ranks wait for this one, the `first_call` in which they wait, or "" if
            another rank has left before.
        """
        store = self._post(number)
        is_first = store.add(f"{self._key(number)}/num_waiting", 1) == 1
        # Only one rank logs, once the others have had time to write that they wait too.
        missing: Sequence[int] = self.ranks
        for i in range(_NUM_LOOKS):
            if has_ended(_GRACE * 2**i):
                note_left_groups()
                return None
            if is_first:
                missing = [rank for rank in missing if not store.check([f"{self._key(number)}/{rank}"])]
                store.set(f"{self._key(number)}/missing", encode_ranks(missing))
                if missing and i == 0:
                    log_missing(kind, missing, len(self.ranks))
            if may_leave:
                self._call_missing(store, number)
                other = self._called_by(store, number)
                # The ranks of a collective that cannot end are notified in the first checks.
                if other is None and i > 1 and store.check([f"left/{self.name}"]):
                    other = ""
                if other is not None:
                    store.set(f"left/{self.name}", "")
                    self.is_left = True
                    return other
        return None

    def exchange_calls(self, call: str) -> dict[str, list[int]]:
        """Write the failed call of this rank to the store, and read those of the other ranks.

        The function waits a moment, because the other ranks may fail a little later.

        Args:
            call: this rank's failed call, see `present_call`.

        Returns:
            {call: global ranks that made it}, as far as the ranks have written it.
        """
        found = {self.here: call}
        # The process that has ended may be the one that hosts the store.
        with suppress(Exception):
            store, end = _store(), time.monotonic() + _SOON
            store.set(f"failed/{self.name}/{self.here}", call)
            store.set(f"failed/{self.name}", "")
            others = [rank for rank in self.ranks if rank != self.here][:_MAX_READ]
            while True:
                for rank in set(others).difference(found):
                    if store.check([f"failed/{self.name}/{rank}"]):
                        found[rank] = store.get(f"failed/{self.name}/{rank}").decode()
                if len(found) > len(others) or time.monotonic() > end:
                    break
                time.sleep(_SOON / 10)
        calls: dict[str, list[int]] = {}
        for rank, one in sorted(found.items()):
            calls.setdefault(one, []).append(rank)
        return calls

    def raise_if_failed(self, number: int) -> None:
        """Raise if another rank has failed in a collective, so that no other collective can end.

        Args:
            number: 1-based index of the collective in which this rank waits.

        Raises:
            RuntimeError: see above.
        """
        store, key = _store(), f"failed/{self.name}"
        if store.check([key]) and store.get(key).decode() in ("", str(number)):
            raise RuntimeError("another rank has failed in a collective, so that this one cannot end.")

    def _key(self, number: int) -> str:
        return f"{self.name}/{number}"

    def _post(self, number: int) -> Store:
        store = _store()
        store.set(f"{self._key(number)}/{self.here}", "")
        store.set(f"at/{self.here}", f"{number} {len(self.ranks)} {self.name}")
        store.set(f"doing/{self.here}", present_call())
        return store

    def _call_missing(self, store: Store, number: int) -> None:
        """Notify missing ranks that wait in a larger group, in a collective that this rank has not entered."""
        if not store.check([f"{self._key(number)}/missing"]):
            return
        missing = decode_ranks(store.get(f"{self._key(number)}/missing").decode())
        # Of two ranks that wait for each other, both detect it. The order of their groups determines which of them
        # leaves.
        _call(store, missing, f"{number} {self.name}", above=(len(self.ranks), self.name))

    def _called_by(self, store: Store, number: int) -> str | None:
        """Return the name of the group whose ranks have notified this rank, and wait for it."""
        key = f"call/{self._key(number)}/{self.here}"
        if not store.check([key]):
            return None
        its_number, name = store.get(key).decode().split(" ", 1)
        if name.startswith(_FIRST_CALL):
            return name
        its = _meetings.get(name)
        return name if its is not None and its.num_entered < int(its_number) else None


def log_missing(kind: str, missing: Sequence[int], size: int) -> None:
    """Log which ranks are missing in a collective.

    Args:
        kind: name of the collective.
        missing: global ranks.
        size: number of ranks of the collective.
    """
    _log.warning(
        "still waiting: %d of %d ranks (%s) have not entered the same %s. They have ended, are stopped or slow, or "
        "have left out this call. Look at the log of the first of them.",
        *(len(missing), size, rank_list(missing), kind),
    )


def call_to_first_call(missing: Sequence[int], ranks: Sequence[int]) -> None:
    """Notify missing ranks that wait in a collective, because this rank waits for them in a first call.

    Args:
        missing: global ranks.
        ranks: global ranks of the first call.
    """
    _call(_store(), missing, f"0 {_FIRST_CALL}{encode_ranks(ranks)}")


def end_waits_of(missing: Sequence[int]) -> dict[int, str]:
    """End the collectives in which missing ranks wait for this rank, while it waits for them elsewhere.

    Args:
        missing: global ranks.

    Returns:
        {rank: its call, see `present_call`} of the ranks that can never make this call, because this rank has not
        entered the collective in which they wait.
    """
    store, call, found = _store(), present_call(), {}
    for rank in missing[:_MAX_CALLED]:
        if not store.check([f"at/{rank}", f"doing/{rank}"]):
            continue
        number, _, name = store.get(f"at/{rank}").decode().split(" ", 2)
        its = _meetings.get(name)
        if its is None or its.num_entered >= int(number):
            continue
        found[rank] = store.get(f"doing/{rank}").decode()
        store.set(f"failed/{name}/{its.here}", call)
        # Only this collective is marked as failed, because this rank may continue and enter the ones after it.
        store.set(f"failed/{name}", number)
    return found


def ranks_of_first_call(name: str) -> Ranks | None:
    """Return the ranks of the first call that waits for this rank, or None for the name of a group."""
    return decode_ranks(name.removeprefix(_FIRST_CALL)) if name.startswith(_FIRST_CALL) else None


def _call(store: Store, missing: Sequence[int], call: str, above: tuple[int, str] = (0, "")) -> None:
    """Notify missing ranks that wait in a collective that this rank has not entered.

    Args:
        store: store of all ranks.
        missing: global ranks.
        call: number and name of the collective or first call that waits for them.
        above: (size, name) that their group must exceed.
    """
    for rank in missing[:_MAX_CALLED]:
        if not store.check([f"at/{rank}"]):
            continue
        number, size, name = store.get(f"at/{rank}").decode().split(" ", 2)
        its = _meetings.get(name)
        # Ranks of a group that another rank has left find this out themselves.
        may_come = its is not None and not its.is_left and its.num_entered < int(number)
        if may_come and (int(size), name) > above:
            store.set(f"call/{name}/{number}/{rank}", call)
            _called.add(name)


def note_left_groups() -> None:
    """Note the groups that a rank has left because this rank has notified it."""
    if _called:
        store = _store()
        for name in list(_called):
            if store.check([f"left/{name}"]):
                _called.discard(name)
                if (meetings := _meetings.get(name)) is not None:
                    meetings.is_left = True


_meetings: weakref.WeakValueDictionary[str, Meetings] = weakref.WeakValueDictionary()
"""Groups of this rank by name, as long as a communicator uses them."""

_called: set[str] = set()
"""Names of groups in which this rank has notified another rank."""

_by_group: weakref.WeakKeyDictionary[object, Meetings] = weakref.WeakKeyDictionary()


def meetings_of(group: object, name: str, ranks: Ranks, here: int) -> Meetings:
    """Return the meetings of a process group, which all communicators over it share."""
    if group not in _by_group:
        _by_group[group] = _meetings[name] = Meetings(name, ranks, here)
    return _by_group[group]


def is_left(group: object) -> bool:
    """Return whether a process group cannot be used any more, because a rank has left it."""
    meetings = _by_group.get(group)
    return meetings is not None and meetings.is_left


def present_call() -> str:
    """Return the function of distclip that the program has called, with the line of the call."""
    frame, function = sys._getframe(1), "a call"
    # Decorators of torch are between the program and a function.
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("distclip.") and not module.startswith("distclip.testing"):
            code = frame.f_code
            if code.co_name not in _DECORATORS:
                # The class of a method is read from its `self`, because code has a qualified name only from Python 3.11
                # on.
                owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else ""
                function = f"{owner}.{code.co_name}".removeprefix(".").removesuffix(".__init__")
        elif module.partition(".")[0] not in ("torch", "contextlib", "functools", "distclip"):
            break
        frame = frame.f_back
    if function == "a call":
        return function
    return f"{function} ({os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno})"


def patience(default: float) -> float:
    """Return the seconds after which a waiting rank logs which ranks are missing.

    The environment variable DISTCLIP_PATIENCE overrides the default.
    """
    return float(os.environ.get("DISTCLIP_PATIENCE", default))


def _store() -> Store:
    return PrefixStore("distclip/waiting", distributed_c10d._get_default_store())
