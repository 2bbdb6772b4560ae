"""Record the behaviour of a rank as a tree: its next request for every history of replies.

A rank is deterministic: the same replies lead to the same requests. So the code of distclip runs once for each history,
and a schedule that has only known histories runs no code at all. After an unknown reply, the rank runs again from its
beginning, with the replies of the history.

A rendezvous leaves nothing behind except its result. So histories that reach the same result in different ways are
merged, see `Actor.forget`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, ClassVar, TypeAlias
from unittest import mock

from torch.distributed import distributed_c10d

from ..comm import discovery, roll_call, waiting
from ..comm.rendezvous import Post, Rendezvous
from .backend import RankState, exception_of, present_store, start_rank
from .faults import Fault
from .network import Failure, Request
from .simulation import RankThread, current_rank, simulated_process

__all__ = ["Access", "Actor", "Group", "Node", "Tree", "accesses", "explored_process"]


class Count:
    """Number in a reply that the rank has not read yet.

    Each comparison is a request, so that few different histories arise.

    Args:
        ask: function that makes the requests.
        index: index among the numbers that the rank has received.
        steps: operations on that number so far.
    """

    def __init__(self, ask: Callable[..., Any], index: int, steps: tuple[tuple[str, int], ...] = ()) -> None:
        self._ask, self._index, self._steps = ask, index, steps

    def _look(self, operation: str, other: Any = 0) -> Any:
        return self._ask("look", self._index, self._steps, operation, int(other))

    def __mod__(self, other: int) -> Count:
        return Count(self._ask, self._index, (*self._steps, ("mod", other)))

    def __floordiv__(self, other: int) -> Count:
        return Count(self._ask, self._index, (*self._steps, ("floordiv", other)))

    def __sub__(self, other: int) -> Count:
        return Count(self._ask, self._index, (*self._steps, ("sub", other)))

    def __add__(self, other: int) -> Count:
        return Count(self._ask, self._index, (*self._steps, ("sub", -other)))

    def __eq__(self, other: object) -> bool:
        return bool(self._look("eq", other))

    def __ne__(self, other: object) -> bool:
        return not self._look("eq", other)

    def __lt__(self, other: int) -> bool:
        return bool(self._look("lt", other))

    def __ge__(self, other: int) -> bool:
        return not self._look("lt", other)

    def __gt__(self, other: int) -> bool:
        return bool(self._look("gt", other))

    def __le__(self, other: int) -> bool:
        return not self._look("gt", other)

    def __bool__(self) -> bool:
        return not self._look("eq", 0)

    def __int__(self) -> int:
        return int(self._look("value"))

    __index__ = __hash__ = __int__

    def __str__(self) -> str:
        return str(int(self))

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)


def look(number: int, steps: Sequence[tuple[str, int]], operation: str, other: int) -> Any:
    """Return the part of a number that a rank reads, see `Count`."""
    for name, operand in steps:
        number = number % operand if name == "mod" else number // operand if name == "floordiv" else number - operand
    if operation == "value":
        return number
    return number == other if operation == "eq" else number < other if operation == "lt" else number > other


class Actor(RankThread):
    """Rank that can run jobs repeatedly. It keeps its thread, its process groups and its meshes.

    Args:
        rank: rank in the world.
        size: size of the world.
        prepare: called once in the thread of the rank. Its collectives succeed at once, as if all ranks had arrived.
    """

    def __init__(self, rank: int, size: int, prepare: Callable[[], Any]) -> None:
        super().__init__(rank, size, f"explorer/{rank}", timeout=60.0)
        self.prepared: Any = None
        self.parked: Node | None = None
        self.num_runs = 0
        self._prepare, self._is_prepared, self._num_counts, self.num_counts_before = prepare, False, 0, 0
        self._job: Callable[[], Any] = prepare
        # Replies to the next requests, in reverse order.
        self._replies: list[Any] = []
        # distclip draws numbers only from the generator of the rank.
        self.state = RankState(f"explorer/{rank}", draws=False)
        self.start(prepare)
        if self.error is not None:
            raise self.error

    def begin(self, job: Callable[[], Any], faults: Sequence[Fault], replies: list[Any]) -> None:
        """Run a job until its first request without a reply.

        Args:
            job: job of the rank.
            faults: faults of the rank.
            replies: replies to its first requests, in reverse order. The list is emptied.
        """
        self.end_job()
        self._replies = replies
        self.num_runs += 1
        self.state.reset()
        self.faults, self.reached, self.stage, self._num_counts = faults, {}, "", 0
        self.is_killed, self.error, self.result, self._num_refused = False, None, None, 0
        self._job = job
        self.resume(None)

    def forget(self, *kept: Any) -> None:
        """Merge the histories since the same `begin_rendezvous` that keep the same values.

        Args:
            kept: everything from that time that the rank can still read.
        """
        # The tokens of posts come from the generator. `_called` is the only other state that a rendezvous changes.
        self.ask(
            "forget",
            self.num_counts_before,
            (*kept, tuple(sorted(waiting._called)), hash(self.state.random.getstate())),
        )

    def begin_rendezvous(self) -> None:
        """Mark the beginning of the history that `forget` merges."""
        self.num_counts_before = self._num_counts
        self.ask("begin")

    def end_job(self) -> None:
        """End the job that waits for a reply."""
        self.parked = None
        if self.request is not None:
            self.is_killed = True
            self.resume(None)

    def ask(self, *request: Any) -> Any:
        """Make a request, see `RankThread.ask`."""
        if not self._is_prepared:
            return _reply_alone(request)
        if self._replies:
            # The thread continues at once, because nothing else needs to run.
            reply = self._replies.pop()
            if type(reply) is Failure:
                raise exception_of(reply)
        else:
            reply = super().ask(*request)
        if request[0] == "forget":
            self._num_counts = request[1]
        elif request[0] == "add":
            self._num_counts += 1
            return Count(self.ask, self._num_counts - 1)
        return reply

    def _main(self, job: Callable[[], Any]) -> None:
        self._enter_thread()
        try:
            start_rank(self.ask, self.rank, self.size, self.timeout)
            self.prepared = job()
        except BaseException as error:
            self.error = error
        self.state.keep()
        self._is_prepared = True
        while True:
            self.request = None
            self._stopped.release()
            self._go.acquire()
            try:
                self.result = self._job()
            except BaseException as error:
                self.error = error
            self.state.unregister_groups()


def _reply_alone(request: Request) -> Any:
    """Return the reply to a request as if all ranks had made the same one."""
    if request[0] == "meet":
        return (request[3],) * len(request[1][0])
    return {"add": 1, "check": True, "now": 0.0, "get": b"", "delete": True}.get(request[0])


class Group:
    """Members of a collective, and the name of their group. Equal groups share one object.

    Args:
        key: (members, name).
    """

    __slots__ = ("key", "members")

    _all: ClassVar[dict[Any, Group]] = {}

    def __init__(self, key: tuple[tuple[int, ...], str]) -> None:
        self.key, self.members = key, key[0]

    @classmethod
    def of(cls, key: tuple[tuple[int, ...], str]) -> Group:
        """Return the group of a key."""
        if key not in cls._all:
            cls._all[key] = Group(key)
        return cls._all[key]


class Node:
    """State of a rank after a history of replies: its next request, or its end.

    Args:
        request: next request. None at the end of the job.
        parent: state before the last reply.
        reply: the last reply.
        result: result of the job, at its end.
        stage: last stage that the rank has reached.

    Attributes:
        children: states after each reply.
        after_number: states after each number that an addition returns, once the rank has read it.
        group: group of the collective that the rank enters next.
        parents: other states that come before this one.
        future: accesses in this state and in the later states that have run, see `accesses`.
    """

    __slots__ = (
        "after_number",
        "children",
        "future",
        "group",
        "id",
        "kind",
        "looked",
        "parent",
        "parents",
        "reply",
        "request",
        "result",
        "stage",
    )

    _num_nodes = 0

    def __init__(self, request: Any, parent: Node | None, reply: Any, result: Any, stage: str) -> None:
        self.request, self.parent, self.reply, self.result, self.stage = request, parent, reply, result, stage
        self.kind: str = "end" if request is None else request[0]
        self.children: dict[Any, Node] = {}
        self.after_number: dict[int, Node] = {}
        self.group = Group.of(request[1]) if self.kind == "meet" else None
        self.parents: list[Node] = []
        self.looked: frozenset[str] | None = None
        self.future: set[Access] = set()
        Node._num_nodes += 1
        self.id = Node._num_nodes

    def keys_looked_at(self) -> frozenset[str]:
        """Return the keys that a rank that sleeps now has read since it last slept."""
        if self.looked is None:
            keys, node = set[str](), self.parent
            while node is not None and node.kind not in ("sleep", "forget"):
                if node.kind == "check":
                    keys.update(node.request[1])
                node = node.parent
            self.looked = frozenset(keys)
        return self.looked

    def learn(self, found: set[Access]) -> bool:
        """Add accesses to the futures of this state and of those before it.

        Args:
            found: accesses of this state, or of a later one.

        Returns:
            Whether the future of a state before this one has changed.
        """
        self.future |= found
        pending, changes = [self], False
        while pending:
            node = pending.pop()
            for parent in (node.parent, *node.parents):
                # A future contains those of all later states, so the search can stop at a state without a change.
                if parent is not None and not found <= parent.future:
                    parent.future |= found
                    pending.append(parent)
                    changes = True
        return changes


Access: TypeAlias = tuple[str, Any]
"""Access to a key of the store, "read", "touch", "write" or "change", or a "look" at a received number.

A touch adds 0 to a counter, so that the key exists afterwards. A change reads the value and writes another one.
"""


def accesses(request: Request | None) -> set[Access]:
    """Return the accesses of a request.

    >>> accesses(("add", "key", 0))
    {('touch', 'key')}
    """
    if request is None:
        return set()
    kind = request[0]
    if kind in ("check", "get", "wait"):
        return {("read", key) for key in request[1]}
    if kind == "add":
        return {("touch" if request[2] == 0 else "change", request[1])}
    if kind in ("append", "compare_set"):
        return {("change", request[1])}
    if kind in ("set", "delete"):
        return {("write", request[1])}
    return {("look", request[1])} if kind == "look" else set()


class Tree:
    """Behaviour of one rank in one scenario.

    Args:
        actor: runs the rank.
        job: its job.
        faults: its faults.
        learns: whether its states learn their futures.
    """

    def __init__(self, actor: Actor, job: Callable[[], Any], faults: Sequence[Fault], learns: bool = False) -> None:
        self.actor, self.job, self.faults, self.learns = actor, job, faults, learns
        # This is the number of states that have extended the future of an earlier one.
        self.num_learned = 0
        # The keys are the beginning of a rendezvous, and the values that are kept of it.
        self._forgetful: dict[tuple[Node, Any], Node] = {}
        self.root = self._begin()

    def child(self, node: Node, reply: Any) -> Node:
        """Return the state after a reply."""
        # The rank reads a number only by further requests.
        key = None if node.kind == "add" else _without_rank(node, reply) if node.kind == "compare_set" else reply
        found = node.children.get(key)
        if found is None:
            self._return_to(node)
            self.actor.resume(reply)
            found = node.children[key] = self._node(node, reply)
            if found.kind == "forget":
                found = node.children[key] = self._merged(node, found)
        return found

    def _merged(self, parent: Node, node: Node) -> Node:
        """Return the state that represents all states that keep the same values of a rendezvous."""
        begin = parent
        while begin.kind != "begin":
            assert begin.parent is not None, "a rank forgets only what it has begun"
            begin = begin.parent
        first = self._forgetful.setdefault((begin, node.request), node)
        if first is not node:
            # The rank is in an equal state, and can continue from that one.
            self.actor.parked = first
            first.parents.append(parent)
            if self.learns:
                self.num_learned += first.learn(first.future)
        return first

    def _begin(self) -> Node:
        self.actor.begin(self.job, self.faults, [])
        return self._node(None, None)

    def _node(self, parent: Node | None, reply: Any) -> Node:
        actor = self.actor
        result = None
        if actor.request is None:
            result = actor.result if actor.error is None else actor.error
        actor.parked = node = Node(actor.request, parent, reply, result, actor.stage)
        if self.learns:
            self.num_learned += node.learn(accesses(actor.request))
        return node

    def _return_to(self, node: Node) -> None:
        """Run the rank again up to a state."""
        if self.actor.parked is node:
            return
        replies: list[Any] = []
        at = node
        while at.parent is not None:
            replies.append(at.reply)
            at = at.parent
        self.actor.begin(self.job, self.faults, replies)
        if self.actor.request != node.request:
            raise AssertionError(f"rank {self.actor.rank} is not deterministic: {self.actor.request}, {node.request}")
        self.actor.parked = node


def _without_rank(node: Node, reply: bytes) -> bytes:
    """Return the reply to a post, without the rank that posted an equal value first.

    If a rank agrees with the first post, its comparison ends, whichever rank made that post.
    """
    own = node.request[3]
    value = own.partition(b":")[2]
    return value if reply != own and reply.partition(b":")[2] == value else reply


def _joined(real: Callable[..., Any]) -> Callable[..., Any]:
    """Discard the history by which a rendezvous reached its result."""

    def join(self: Rendezvous, post: Post, timeout: timedelta) -> Any:
        actor = current_rank()
        if actor is None:
            return real(self, post, timeout)
        actor.begin_rendezvous()
        try:
            component = real(self, post, timeout)
        except Exception as error:
            actor.forget(type(error), str(error), tuple(sorted(self._groups)))
            raise
        actor.forget(component, tuple(sorted(self._groups)))
        return component

    return join


def _searched(real: Callable[..., Any]) -> Callable[..., Any]:
    """Discard the history by which a rank reached stage 3 of a rendezvous."""

    def search(self: Rendezvous, post: Post, deadline: float) -> Any:
        actor = current_rank()
        if actor is not None:
            actor.forget(post, deadline, tuple(sorted(self._groups)))
        return real(self, post, deadline)

    return search


@contextmanager
def explored_process() -> Iterator[None]:
    """Replace the store of each rank by one in Python, whose numbers the ranks read by requests."""

    def prefixed(real: Any) -> Callable[[str, Any], Any]:
        def make(prefix: str, store: Any) -> Any:
            own = present_store()
            return real(prefix, store) if own is None or store is not own else own.prefixed(prefix)

        return make

    get_store = distributed_c10d._get_default_store

    def store_of_rank() -> Any:
        return present_store() or get_store()

    with ExitStack() as stack:
        stack.enter_context(simulated_process())
        stack.enter_context(mock.patch.object(Rendezvous, "join", _joined(Rendezvous.join)))
        stack.enter_context(mock.patch.object(Rendezvous, "_search", _searched(Rendezvous._search)))
        for module in (discovery, roll_call, waiting):
            stack.enter_context(mock.patch.object(module, "PrefixStore", prefixed(module.PrefixStore)))
        stack.enter_context(mock.patch.object(distributed_c10d, "_get_default_store", store_of_rank))
        stack.enter_context(mock.patch.dict(os.environ, DISTCLIP_PATIENCE="10"))
        # Warning filters belong to the process, so they cannot be set per rank.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger = logging.getLogger("distclip")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
