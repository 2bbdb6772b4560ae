"""Start a world of new processes for one job. The processes rendezvous through a file, and end with the job."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from .errors import BenchError

__all__ = ["default_size", "on_ranks", "start_ranks"]

TIMEOUT = timedelta(minutes=5)
"""Timeout of a collective."""


def default_size(device: str) -> int:
    """Return the default world size: four ranks on a CPU, one per GPU."""
    return torch.cuda.device_count() if device == "cuda" else 4


def on_ranks(
    job: Callable[..., Any], size: int, device: str, threads: int | None, advance: Callable[[], object], **kwargs: Any
) -> list[Any]:
    """Call `job(**kwargs, advance=…)` on every rank of a new world.

    Args:
        job: a function that is importable by name.
        size: number of ranks.
        device: "cpu" (gloo) or "cuda" (nccl).
        threads: number of threads of torch on each rank. None to share the processors.
        advance: called in this process whenever rank 0 calls its `advance`.
        kwargs: arguments of the job. They must be picklable.

    Returns:
        The return values of the ranks, in order. They must be picklable.

    Raises:
        BenchError: a rank failed. The message has the traceback of the first one.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // size)
    preload = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.debug", __name__]
    with start_ranks(_run_rank, size, (size, device, threads, job, kwargs), preload) as connections:
        return _collect(connections, advance)


@contextmanager
def start_ranks(
    main: Callable[..., None], size: int, arguments: tuple[Any, ...], preload: list[str]
) -> Iterator[list[Connection]]:
    """Start a process for each rank, and kill all of them at the end, even if they hang.

    Args:
        main: called as `main(rank, folder, connection, *arguments)` in each process. `folder` is an empty directory
            that all ranks share, so that they can rendezvous in it.
        size: number of ranks.
        arguments: further arguments of `main`. They must be picklable.
        preload: modules that are imported before the processes start.

    Yields:
        A connection to each rank.
    """
    # The fork server has imported torch but called nothing, so it starts a rank in a fraction of a second.
    context: Any = mp.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(preload)
    pipes = [context.Pipe() for _ in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=main, args=(rank, folder, child_end, *arguments), daemon=True)
            for rank, (_, child_end) in enumerate(pipes)
        ]
        try:
            for process, (_, child_end) in zip(processes, pipes, strict=True):
                process.start()
                child_end.close()
            yield [parent_end for parent_end, _ in pipes]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(connections: list[Connection], advance: Callable[[], object]) -> list[Any]:
    results: dict[int, Any] = {}
    open_ = dict(zip(connections, range(len(connections)), strict=True))
    while open_:
        for connection in wait(list(open_)):
            assert isinstance(connection, Connection)
            try:
                kind, content = connection.recv()
            except EOFError:
                kind, content = "failed", "the process died"
            if kind == "advance":
                advance()
                continue
            rank = open_.pop(connection)
            if kind == "failed":
                raise BenchError(f"rank {rank} of {len(connections)}:\n{content}")
            results[rank] = content
    return [results[rank] for rank in range(len(connections))]


def _run_rank(
    rank: int,
    folder: str,
    connection: Connection,
    size: int,
    device: str,
    threads: int,
    job: Callable[..., Any],
    kwargs: dict[str, Any],
) -> None:
    """Initialize a rank, run the job, and send its result."""
    # The parent handles Ctrl-C and kills this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torch would print each warning about a competitor once per rank.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)

    def advance() -> None:
        if rank == 0:
            connection.send(("advance", None))

    try:
        backend, device_id = "gloo", None
        if device == "cuda":
            backend, device_id = "nccl", torch.device("cuda", rank)
            torch.cuda.set_device(device_id)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device_id,
        )
        message = ("done", job(**kwargs, advance=advance))
        # A rank must not exit while another rank may still read from it.
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        message = ("failed", traceback.format_exc())
    connection.send(message)
