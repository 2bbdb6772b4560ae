"""Start ranks that have a framework imported already.

Importing a framework takes seconds, and each rank of each world would pay for it. Here one process imports it and forks
the ranks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing as mp
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from tests import ranks
from tests.forks import forkserver


class Preloader:
    """A process that imports modules once and then forks ranks.

    Args:
        modules: names of the modules to import.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = list(modules)
        self._process: Any = None
        self._connection: Any = None
        self._worlds: dict[tuple[int, str], PreloadedWorld] = {}

    def world(self, size: int, kind: str = "") -> PreloadedWorld:
        """Return the world of `size` ranks. Jobs of another `kind` get other processes."""
        return self._worlds.setdefault((size, kind), PreloadedWorld(size, self))

    def fork(self, size: int, folder: str, port: int) -> list[int]:
        """Fork ranks that connect to a socket in `folder` and a store at `port`, and return their process ids."""
        if self._process is None:
            self._connection, there = mp.Pipe()
            self._process = forkserver().Process(target=_fork_on_request, args=(self._modules, there), daemon=True)
            self._process.start()
            there.close()
        self._connection.send((size, folder, port))
        pids: list[int] = self._connection.recv()
        return pids

    def stop(self) -> None:
        """End all ranks and the process itself."""
        for world in self._worlds.values():
            world.stop()
        if self._process is not None:
            self._process.kill()
            self._process.join()


class PreloadedWorld(ranks.World):
    """A world whose ranks are forked by a `Preloader`."""

    def __init__(self, size: int, preloader: Preloader) -> None:
        super().__init__(size)
        self._preloader = preloader

    def _start(self) -> None:
        self._store = ranks.new_store()
        with (
            tempfile.TemporaryDirectory() as folder,
            Listener(_socket_in(folder), "AF_UNIX", backlog=self.size) as listener,
        ):
            pids = self._preloader.fork(self.size, folder, self._store.port)
            by_rank = {}
            for _ in range(self.size):
                connection = listener.accept()
                by_rank[connection.recv()] = connection
        self._connections = [by_rank[rank] for rank in range(self.size)]
        self._processes = [_ForkedRank(pid) for pid in pids]


class _ForkedRank:
    """A rank that is not a child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def join(self) -> None:
        """Do nothing, because only the parent of a process can wait for it."""


def _socket_in(folder: str) -> str:
    return str(Path(folder) / "ranks")


def _fork_on_request(modules: Sequence[str], connection: Connection) -> None:
    """Import modules, and then fork ranks for every (size, folder, port) that is received."""
    # This process does not wait for the ranks, so the kernel must reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            # Tests that need a missing framework are skipped, but not all tests in its folder need it.
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)
    # A full collection visits a million objects otherwise, and DeepSpeed asks for many of them.
    gc.freeze()
    while True:
        try:
            size, folder, port = connection.recv()
        except EOFError:
            return
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                connection.close()
                _run_rank(rank, size, folder, port)
            pids.append(pid)
        connection.send(pids)


def _run_rank(rank: int, size: int, folder: str, port: int) -> None:
    """Run jobs until the test session closes the connection. It does not return."""
    try:
        # Frameworks start and await processes too.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with Client(_socket_in(folder), "AF_UNIX") as connection:
            connection.send(rank)
            ranks._serve(rank, size, port, connection)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
