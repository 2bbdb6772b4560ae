"""Warm worlds: forkserver workers that keep their process group and take jobs, so that a case costs milliseconds.

A job is a function importable by name; every rank calls it and returns something picklable. A failure or a time-out is
reported with the rank's own traceback, and the world is replaced by a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
"""Seconds after which a collective gives up, and a job counts as hung a little later."""

_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "distclip",
]


class RankError(AssertionError):
    """A job failed on some rank, or did not end."""


def everywhere(mine: Any) -> list[Any]:
    """What each rank says, in order; call it on all of them, within a job."""
    import torch.distributed as dist

    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def _serve(rank: int, size: int, folder: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    from distclip.comm import discovery

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # The layouts use NO_SHARD on purpose.
    warnings.filterwarnings("ignore", message="The `NO_SHARD` sharding strategy is deprecated")
    # FSDP2's, about any module that ends in a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # torch.distributed.checkpoint's own, before torch 2.13.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    # Of torch 2.12, whatever check_invariants= says.
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            job, kwargs = connection.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            # Every job is the first of its program: nothing was agreed on before.
            discovery._lives.clear()
            answer = (True, job(**kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
    dist.destroy_process_group()


class World:
    """`size` gloo ranks in processes of their own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: Callable[..., Any], *, timeout: float = 1.5 * TIMEOUT, **kwargs: Any) -> list[Any]:
        """Call `job(**kwargs)` on every rank and return what they returned, in order.

        Raises:
            RankError: a rank raised, died, or did not answer in time.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((job, kwargs))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        while waiting:
            # Once a rank has failed the others may wait for it: they get a moment, not the whole time.
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
            return [answers[rank] for rank in range(self.size)]
        self.stop()
        silent = sorted(waiting.values())
        report = "\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items()))
        raise RankError(f"{report}\n--- ranks without an answer: {silent}")

    def stop(self) -> None:
        """End the ranks; the next job starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(Path(self._folder.name)), there), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)


@contextlib.contextmanager
def worlds() -> Iterator[Callable[[int], World]]:
    """`of(4)`: four gloo ranks, which stay as long as the block lasts."""
    started: dict[int, World] = {}
    try:
        yield lambda size: started.setdefault(size, World(size))
    finally:
        for world in started.values():
            world.stop()
