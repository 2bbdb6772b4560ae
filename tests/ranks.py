"""Run tests on ranks: worlds of worker processes that keep their process group from one test to the next.

`@on_ranks(2, 4)` runs the body of a test on every rank of a world of two ranks and of a world of four:

    @on_ranks(2, 4)
    @pytest.mark.parametrize("norm_type", [1.0, 2.0])
    def test_norm(norm_type: float) -> None:
        ...  # dist.get_rank() and dist.get_world_size() tell the ranks apart

Workers import a test by the name of its module and run its body, so that a case costs milliseconds. A failure or a
time-out is reported with the traceback of each rank and the values in its `assert`, and a new world replaces the old.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from inspect import Parameter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests.forks import end_with_parent, forkserver

TIMEOUT = 60.0
"""Seconds after which a collective gives up. A job counts as hung a little later."""


class RankError(AssertionError):
    """A failure of a job on some rank, or a job that did not end."""


def gather_from_ranks(value: Any) -> list[Any]:
    """Gather `value` from every rank, in order. Call it on all ranks, within a job."""
    import torch.distributed as dist

    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, value)
    return by_rank


def on_ranks(*sizes: int, fixture: str = "world") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the body of a test on every rank of a world, once for each size.

    The arguments of the body are parameters of `pytest.mark.parametrize` or fixtures. They are pickled, and so must be
    plain data. A body that has an argument `num_ranks` receives the size of the world.

    Args:
        sizes: number of ranks of each world. Without any, a parameter `num_ranks` of the test has the size, for
            instance from the row of a table.
        fixture: the fixture that starts worlds: "world" for those of the session, "ranks" for new ones in each module.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        arguments = inspect.signature(body).parameters
        is_parametrized = len(sizes) != 1

        # Pytest reads the marks of the body, which `wraps` copies, and the signature that is set below.
        @functools.wraps(body)
        def test(**kwargs: Any) -> None:
            world = kwargs.pop(fixture)
            num_ranks = kwargs.pop("num_ranks") if is_parametrized else sizes[0]
            if "num_ranks" in arguments:
                kwargs["num_ranks"] = num_ranks
            world(num_ranks).run(_run_body, test=test, arguments=kwargs)

        names = [fixture, *(["num_ranks"] if is_parametrized else []), *(n for n in arguments if n != "num_ranks")]
        keyword_only = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
        test.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        test = pytest.mark.ranks(*sizes)(test)
        return pytest.mark.parametrize("num_ranks", sizes)(test) if len(sizes) > 1 else test

    return decorate


def _run_body(test: Any, arguments: dict[str, Any]) -> None:
    """Run the body of a test that `on_ranks` has decorated. Workers call it."""
    test.__wrapped__(**arguments)


def raise_if_replicas_differ() -> None:
    """Make "raise" the default of `GradClipper(replicas=...)` in this process, so that every test shows a false alarm.

    A test that counts host syncs, or that lets replicas differ, passes replicas="warn" or another rule itself.
    """
    _replace_default("raise")


@contextlib.contextmanager
def replicas_may_differ() -> Iterator[None]:
    """Restore "warn" as the default for clippers that integrations construct within the block."""
    _replace_default("warn")
    try:
        yield
    finally:
        _replace_default("raise")


def _replace_default(replicas: str) -> None:
    from distclip import GradClipper

    # What torch.no_grad() has wrapped has the defaults.
    GradClipper.__init__.__wrapped__.__kwdefaults__["replicas"] = replicas  # type: ignore[attr-defined]


def rewrite_asserts() -> None:
    """Make failing asserts show their values in all modules of tests, including tables and checks."""
    names = (f"tests.{path.stem}" for path in Path(__file__).parent.iterdir())
    # Pytest warns of modules that were imported before, such as this one.
    pytest.register_assert_rewrite(*(name for name in names if name not in sys.modules))


def _rewrite_asserts_on_rank() -> None:
    """Make failing asserts show their values in the process of a rank, where pytest does not run."""
    from _pytest.assertion import util
    from _pytest.config import get_config

    # Plugins and conftest.py are for the process that collects tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    config = get_config()
    config.parse(["--assert=rewrite", "--noconftest"])
    rewrite_asserts()

    def compare(op: str, left: Any, right: Any) -> str | None:
        for lines in config.hook.pytest_assertrepr_compare(config=config, op=op, left=left, right=right):
            if lines:
                return "\n~".join(line.replace("\n", "\\n") for line in lines).replace("%", "%%")
        return None

    util._reprcompare = compare


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    """Join the process group of a world and run jobs until the connection closes."""
    import torch
    import torch.distributed as dist

    from distclip.comm import discovery
    from distclip.sharding import cache

    # Ranks are stopped between jobs. They would not notice that the connection closes, and a shell that ends hangs up
    # process groups with a stopped process.
    end_with_parent()
    os.setsid()
    _rewrite_asserts_on_rank()
    raise_if_replicas_differ()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # The layouts use NO_SHARD on purpose.
    warnings.filterwarnings("ignore", message="The `NO_SHARD` sharding strategy is deprecated")
    # FSDP2 warns about any module that ends in a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # torch.distributed.checkpoint causes this one before torch 2.13.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    # Torch 2.12 warns even where check_invariants= is passed.
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    # Ranks that wait for a key of a file would poll it, and keep each other from writing it on a busy machine.
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            job, kwargs = connection.recv()
        except EOFError:
            break
        except BaseException:
            # The module of a job may not import here. Every rank then reports that error.
            connection.send((False, traceback.format_exc()))
            continue
        try:
            torch.manual_seed(0)
            # Each job is the first of its program, so that no communicator and no table is known before.
            discovery.forget_all()
            cache.forget_all()
            answer = (True, job(**kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
    dist.destroy_process_group()


class World:
    """A world of `size` gloo ranks, each in a process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._store: Any = None

    def run(self, job: Callable[..., Any], *, timeout: float = 1.5 * TIMEOUT, **kwargs: Any) -> list[Any]:
        """Call `job(**kwargs)` on every rank and return what the ranks returned, in order.

        Args:
            job: a function that workers can import by name.
            timeout: seconds without any answer after which the job counts as hung.
            kwargs: picklable arguments of the job.

        Raises:
            RankError: a rank raised, died, or did not answer in time.
        """
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        for connection in self._connections:
            connection.send((job, kwargs))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        while waiting:
            # Once a rank has failed the others may wait for it. Two seconds are enough for those that do not.
            ready = wait(list(waiting), timeout=2.0 if failures else timeout)
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    ok, answer = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, answer = False, "the process died"
                (answers if ok else failures)[rank] = answer
        if len(answers) == self.size:
            # The thread of each gloo group wakes a hundred times a second, and worlds have dozens of groups.
            self._signal(signal.SIGSTOP)
            return [answers[rank] for rank in range(self.size)]
        # The ranks may be stuck in a collective, and their meshes in any state.
        self.stop()
        silent = sorted(waiting.values())
        report = "\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items()))
        raise RankError(f"{report}\n--- ranks without an answer: {silent}")

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def stop(self) -> None:
        """End the ranks. The next job starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections, self._store = [], [], None

    def _start(self) -> None:
        context = forkserver()
        self._store = new_store()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, self._store.port, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)


def new_store() -> Any:
    """Return a store in this process, which the ranks of a world share."""
    import torch.distributed as dist

    # The system picks the port.
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def worlds() -> Iterator[Callable[[int], World]]:
    """Yield a function that returns the world of a size, which stays as long as the block lasts."""
    started: dict[int, World] = {}
    try:
        yield lambda size: started.setdefault(size, World(size))
    finally:
        for world in started.values():
            world.stop()
