"""Run ranks in one process, in virtual time and in an order that follows from a seed (`World`).

One rank runs at a time, until it communicates. The seed determines which rank runs next. So a run is reproducible, a
timeout takes no real time, and a deadlock of the ranks is detected at once.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import device_mesh, get_backend

from ..comm import process_group
from ..devices import free_host_memory
from ..errors import ArgumentError
from .backend import RankState, exception_of, gather_objects, start_rank
from .faults import Fault, InjectedFault, check_stage, stage_functions
from .network import WAITING, Failure, Network, Request

__all__ = ["Run", "World", "WorldHangs"]

BYTES_PER_RANK = 12 * 2**20
"""Minimum memory of one simulated rank: its thread, and its copy of torch.distributed."""


class WorldHangs(RuntimeError):
    """The ranks of a simulated world wait for each other without end."""


class RankEnds(BaseException):
    """End of a rank that was killed. It is not an error of the program."""


@dataclass(frozen=True, slots=True)
class Run:
    """Result of `World.run`.

    Args:
        seed: seed of the schedule.
        results: value that each rank returned, by rank. None for a rank that raised or was killed.
        errors: exceptions of the ranks that raised.
        killed: ranks that were killed.
        stages: last stage of each rank.
        seconds: virtual time at the end.
        schedule: (rank, operation) of all messages, in order.
        mismatches: descriptions of the collectives that ranks have entered in different orders.
    """

    seed: int
    results: tuple[Any, ...]
    errors: Mapping[int, BaseException]
    killed: frozenset[int]
    stages: tuple[str, ...]
    seconds: float
    schedule: tuple[tuple[int, str], ...] = field(repr=False)
    mismatches: tuple[str, ...] = ()

    def raise_if_failed(self) -> Run:
        """Raise the error of the lowest rank that has one. Return this run if there is none."""
        for _, error in sorted(self.errors.items()):
            raise error
        return self


@dataclass(frozen=True)
class World:
    """A world of ranks in one process, with virtual time.

    Its methods return another world with one more fault.

    Every rank is a thread with a separate torch.distributed. Process groups, DTensors, FSDP2 and distclip work in it as
    in a process, on the CPU.

    Args:
        num_ranks: number of ranks.
        seed: determines the order in which the ranks run.
        timeout: virtual seconds after which a rank that waits for a key of the store gives up.

    Raises:
        ArgumentError: `num_ranks` is not a number ≥ 1, or too large for the memory of this machine.

    >>> import torch, torch.distributed as dist
    >>> from distclip import clip_grad_norm_
    >>> def train():
    ...     weight = torch.nn.Parameter(torch.zeros(1))
    ...     weight.grad = torch.tensor([3.0 + dist.get_rank()])
    ...     return float(clip_grad_norm_([("w", weight)], 1.0, split_over=dist.group.WORLD))
    >>> World(2).run(train).results
    (5.0, 5.0)
    >>> run = World(2).fail(rank=1, at="measure").run(train)
    >>> run.errors
    {0: PeerError('rank 1 failed with InjectedFault: fault at "measure"'), 1: InjectedFault('fault at "measure"')}
    """

    num_ranks: int
    seed: int = 0
    timeout: float = 60.0
    faults: tuple[Fault, ...] = field(default=(), repr=False, kw_only=True)
    delays: tuple[tuple[int, float], ...] = field(default=(), repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.num_ranks, bool) or not isinstance(self.num_ranks, int) or self.num_ranks < 1:
            raise ArgumentError(f"num_ranks={self.num_ranks!r}: not a number of ranks ≥ 1. Use World(4).")
        check_memory(self.num_ranks)

    def fail(self, *, rank: int, at: str, call: int = 1, error: BaseException | None = None) -> World:
        """Return a world in which a rank raises at the beginning of a stage.

        A rank that raises at "gather" or "all_reduce" does not enter the collective, and its peers may wait forever.

        Args:
            rank: the rank.
            at: stage, one of `STAGES`.
            call: 1-based index among the times that the rank reaches the stage.
            error: exception to raise. None for an `InjectedFault`.

        Raises:
            ArgumentError: there is no such rank, stage or call.
        """
        default = InjectedFault(f'fault at "{check_stage(at)}"')
        return self._with(rank, at, call, default if error is None else error)

    def kill(self, *, rank: int, at: str, call: int = 1) -> World:
        """Return a world in which a rank ends at the beginning of a stage, like a killed process.

        Its collectives then fail on their other members.

        Args:
            rank, at, call: see `fail`.

        Raises:
            ArgumentError: see `fail`.
        """
        return self._with(rank, at, call, None)

    def late(self, *, rank: int, seconds: float = 1.0) -> World:
        """Return a world in which a rank begins its job some virtual seconds after the others.

        Args:
            rank: the rank.
            seconds: seconds, > 0.

        Raises:
            ArgumentError: there is no such rank, or `seconds` is not above 0.
        """
        if not seconds > 0:
            raise ArgumentError(f"seconds={seconds!r}: not a delay. Use a number above 0.")
        return self._copy(delays=(*self.delays, (self._checked(rank), float(seconds))))

    def run(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Run:
        """Call `job(*args, **kwargs)` on every rank, and return what happened.

        The ranks share the memory of this process: a job must make its own model and its own tensors on each rank.
        `time.sleep`, `time.time` and `time.monotonic` are virtual within the job.

        Args:
            job: called on every rank. `torch.distributed` is initialized.
            args, kwargs: arguments of the job, the same objects on every rank.

        Returns:
            The result. An exception of a rank is in its `errors`.

        Raises:
            WorldHangs: ranks wait for each other without end.
            RuntimeError: another world runs in this process.
        """
        if not _running.acquire(blocking=False):
            raise RuntimeError("another simulated world runs in this process. Run one after the other.")
        try:
            with simulated_process():
                return _Simulation(self, lambda: job(*args, **kwargs)).run()
        finally:
            _running.release()

    def _checked(self, rank: int) -> int:
        if rank not in range(self.num_ranks):
            raise ArgumentError(f"rank={rank!r}: not in this world. Use a rank from 0 to {self.num_ranks - 1}.")
        return rank

    def _with(self, rank: int, at: str, call: int, error: BaseException | None) -> World:
        if isinstance(call, bool) or not isinstance(call, int) or call < 1:
            raise ArgumentError(f"call={call!r}: not the index of a call. Use 1 for the first one.")
        return self._copy(faults=(*self.faults, Fault(self._checked(rank), check_stage(at), call, error)))

    def _copy(self, **changes: Any) -> World:
        kept = {"faults": self.faults, "delays": self.delays} | changes
        return World(self.num_ranks, self.seed, self.timeout, **kept)


_running = threading.Lock()


def check_memory(num_ranks: int) -> None:
    """Raise if a number of simulated ranks does not fit into the memory of this machine.

    Raises:
        ArgumentError: see above.
    """
    free = free_host_memory()
    if num_ranks * BYTES_PER_RANK > free:
        raise ArgumentError(
            f"num_ranks={num_ranks}: each simulated rank needs about {BYTES_PER_RANK / 2**20:.0f} MiB, and "
            f"{free / 2**20:.0f} MiB of memory are free. Use at most {max(1, free // BYTES_PER_RANK)} ranks."
        )


class RankThread:
    """A rank: a thread that runs only between a reply and its next request.

    Args:
        rank: rank in the world.
        size: size of the world.
        seed: seed of its random numbers.
        timeout: timeout of its store.
    """

    def __init__(self, rank: int, size: int, seed: str, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.state = RankState(seed)
        self.stage, self.reached = "", dict[str, int]()
        self.faults: Sequence[Fault] = ()
        self.delay = 0.0
        self.request: Request | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        # `is_killed` is set by a fault or at the end of the world, and `is_dead` when the network has removed the rank.
        self.is_killed = self.is_dead = False
        self._num_refused = 0
        self._reply: Any = None
        # These are binary semaphores, which are faster than those of `threading`.
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], Any]) -> None:
        """Run the job until its first request."""
        self._thread = threading.Thread(target=self._main, args=(job,), daemon=True, name=f"rank {self.rank}")
        self.state.swap()
        try:
            self._thread.start()
            self._stopped.acquire()
        finally:
            self.state.swap()

    def resume(self, reply: Any) -> None:
        """Run until the next request, which is None at the end of the job."""
        self._reply, self.request = reply, None
        self.state.swap()
        try:
            self._go.release()
            self._stopped.acquire()
        finally:
            self.state.swap()

    def end(self) -> None:
        """End the thread."""
        self.is_killed = True
        # Code that swallows every exception continues, and each of its requests is refused.
        if self.request is not None:
            self.resume(None)

    def ask(self, *request: Any) -> Any:
        """Make a request in the thread of the rank. Return the reply, or raise."""
        self._refuse()
        self.request = request
        self._stopped.release()
        self._go.acquire()
        self._refuse()
        reply = self._reply
        if type(reply) is Failure:
            raise exception_of(reply)
        return reply

    def enter(self, stage: str) -> None:
        """Begin a stage in the thread of the rank, and fail if it has a fault there."""
        if self.is_killed:
            raise RankEnds
        self.stage = stage
        count = self.reached[stage] = self.reached.get(stage, 0) + 1
        for fault in self.faults:
            if fault.stage == stage and fault.call == count:
                if fault.error is not None:
                    raise fault.error
                self.is_killed = True
                raise RankEnds

    def begin_rendezvous(self) -> None:
        """Begin a rendezvous. Only explored ranks record it."""

    def forget(self, *kept: Any) -> None:
        """Discard the rank's history since `begin_rendezvous`. Only explored ranks do so."""

    def _refuse(self) -> None:
        if self.is_killed:
            self._num_refused += 1
            if self._num_refused > 1000:
                # The program swallows every exception and retries forever.
                self.request = None
                self._stopped.release()
                threading.Event().wait()
            raise RankEnds

    def _enter_thread(self) -> None:
        _current.rank = self

    def _main(self, job: Callable[[], Any]) -> None:
        self._enter_thread()
        try:
            start_rank(self.ask, self.rank, self.size, self.timeout)
            if self.delay:
                self.ask("sleep", self.delay)
            self.result = job()
        except BaseException as error:
            self.error = error
        self.request = None
        self._stopped.release()


class _Current(threading.local):
    """The rank that runs in this thread."""

    rank: RankThread | None = None


_current = _Current()


def current_rank() -> RankThread | None:
    """Return the rank that runs in this thread, or None."""
    return _current.rank


@contextmanager
def simulated_process() -> Iterator[None]:
    """Replace stages, time and random bytes by those of the running rank, within the block."""

    def staged(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if (rank := _current.rank) is not None:
                rank.enter(stage)
            return function(*args, **kwargs)

        return call

    def on_rank(owner: Any, name: str, replacement: Callable[..., Any]) -> Any:
        real = vars(owner)[name]

        @wraps(real)
        def call(*args: Any, **named: Any) -> Any:
            return real(*args, **named) if (rank := _current.rank) is None else replacement(rank, *args, **named)

        return mock.patch.object(owner, name, call)

    def now(rank: RankThread) -> float:
        return float(rank.ask("now"))

    with ExitStack() as stack:
        for stage, owner, name, function in stage_functions():
            stack.enter_context(mock.patch.object(owner, name, staged(stage, function)))
        stack.enter_context(on_rank(time, "time", now))
        stack.enter_context(on_rank(time, "monotonic", now))
        stack.enter_context(on_rank(time, "sleep", lambda rank, seconds: rank.ask("sleep", seconds)))
        # The module `secrets` gets its bytes from `random`.
        for module, name in ((os, "urandom"), (random, "_urandom")):
            stack.enter_context(on_rank(module, name, lambda rank, n: rank.state.random.randbytes(n)))
        hook = sys.excepthook
        # Equal meshes of two ranks must not share a key in torch's caches. Torch has a rule for ranks in threads.
        stack.enter_context(
            on_rank(device_mesh, "get_backend", lambda _, *args: "threaded" if not args else get_backend(*args))
        )
        stack.enter_context(
            on_rank(dist, "all_gather_object", lambda _, *args, **named: gather_objects(*args, **named))
        )
        begin = lambda _, tensor, op, group: group.begin_all_reduce(tensor, op)  # noqa: E731
        stack.enter_context(on_rank(process_group, "begin_all_reduce", begin))
        # C++ has one registry of process groups, or one for each thread.
        registry: Any = _distributed_c10d
        registry._set_thread_isolation_mode(True)
        try:
            yield
        finally:
            registry._set_thread_isolation_mode(False)
            # torch.distributed prefixes tracebacks with the rank.
            sys.excepthook = hook


class _Simulation:
    """One run of a world."""

    def __init__(self, world: World, job: Callable[[], Any]) -> None:
        self.world, self.job = world, job
        self.network = Network(world.num_ranks)
        self.ranks = [
            RankThread(rank, world.num_ranks, f"{world.seed}/{rank}", world.timeout) for rank in range(world.num_ranks)
        ]
        delays = dict(world.delays)
        for rank in self.ranks:
            rank.delay = delays.get(rank.rank, 0.0)
            rank.faults = [fault for fault in world.faults if fault.rank == rank.rank]
        self.choices = random.Random(world.seed)
        self.schedule: list[tuple[int, str]] = []

    def run(self) -> Run:
        """Run all ranks to their ends."""
        network, ranks = self.network, self.ranks
        # These ranks can run. Each has the reply to resume it with, unless it has not started.
        runnable: dict[int, Any] = {rank.rank: WAITING for rank in ranks}
        started = set[int]()
        try:
            while True:
                runnable |= {rank: reply for rank, reply in network.ready if not ranks[rank].is_killed}
                network.ready.clear()
                if not runnable:
                    if all(rank.request is None and rank.rank in started for rank in ranks):
                        break
                    if network.advance():
                        continue
                    raise WorldHangs(self._describe_hang())
                chosen = self.choices.choice(sorted(runnable))
                reply = runnable.pop(chosen)
                rank = ranks[chosen]
                if chosen not in started:
                    started.add(chosen)
                    rank.start(self.job)
                else:
                    rank.resume(reply)
                self._serve(rank, runnable)
        finally:
            for rank in ranks:
                rank.end()
        return Run(
            self.world.seed,
            tuple(None if rank.error is not None else rank.result for rank in ranks),
            {r.rank: r.error for r in ranks if r.error is not None and not r.is_dead},
            frozenset(network.dead),
            tuple(rank.stage for rank in ranks),
            network.clock,
            tuple(self.schedule),
            tuple(network.mismatches),
        )

    def _serve(self, rank: RankThread, runnable: dict[int, Any]) -> None:
        """Carry out the request of a rank that has just run."""
        if rank.is_killed and not rank.is_dead:
            rank.is_dead = True
            self.network.kill(rank.rank)
        if rank.is_killed:
            if rank.request is not None:
                rank.end()
            return
        if rank.request is None:
            return
        self.schedule.append((rank.rank, str(rank.request[0])))
        reply = self.network.perform(rank.rank, rank.request)
        if reply is not WAITING:
            runnable[rank.rank] = reply

    def _describe_hang(self) -> str:
        waiting = [rank for rank in self.ranks if rank.request is not None]
        texts = self.network.describe(rank.rank for rank in waiting)
        lines = [
            f"  rank {rank.rank}: last stage {rank.stage or 'none'}, "
            + (
                texts[rank.rank]
                if rank.rank in texts
                else "has ended" + (f" ({rank.error!r:.120})" if rank.error else "")
            )
            for rank in self.ranks
        ]
        return "\n".join(
            [f"the ranks of a simulated world (seed {self.world.seed}) wait for each other without end.", *lines]
        )
