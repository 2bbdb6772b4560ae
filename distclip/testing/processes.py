"""Run cases on worlds of processes, which may include cases that hang."""

from __future__ import annotations

import logging
import multiprocessing as mp
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .cases import random_case
from .check import Answer, check_case

__all__ = ["run_seeds"]

SECONDS = 60.0
"""Seconds after which a case counts as hung."""


def run_seeds(num_ranks: int, seeds: Sequence[int]) -> Iterator[tuple[int, list[Answer]]]:
    """Run the cases of some seeds on a world of processes.

    A case that does not end fails, and the next case runs on a new world.

    Args:
        num_ranks: size of the world.
        seeds: seeds of the cases.

    Yields:
        Seed, and the answer of every rank.
    """
    done = 0
    while done < len(seeds):
        with tempfile.TemporaryDirectory() as folder:
            world = _World(num_ranks, seeds[done:], folder)
            try:
                for answers in world.answers():
                    yield seeds[done], answers
                    done += 1
                    if any(answer.failure and not answer.is_comparison for answer in answers):
                        break  # The ranks may be in different states.
            finally:
                world.stop()


class _World:
    def __init__(self, num_ranks: int, seeds: Sequence[int], folder: str) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["distclip", "torch.distributed.tensor"])
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._num_seeds, self._is_done = len(seeds), False
        for rank in range(num_ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(rank, num_ranks, list(seeds), str(Path(folder)), there), daemon=True
            )
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def answers(self) -> Iterator[list[Answer]]:
        """Yield the answers of all ranks to each case. The last ones may be of a case that hangs."""
        for _ in range(self._num_seeds):
            by_rank = []
            for connection in self._connections:
                answer = Answer(failure=f"no answer within {2 * SECONDS:.0f} s")
                try:
                    if connection.poll(2 * SECONDS):
                        answer = connection.recv()
                except EOFError:
                    answer = Answer(failure="the process died")
                by_rank.append(answer)
            yield by_rank
        self._is_done = True

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            # After the last case, the processes end together unless they are stuck.
            process.join(timeout=5.0 if self._is_done else 0.0)
            process.kill()
            process.join()


def _serve(rank: int, num_ranks: int, seeds: Sequence[int], folder: str, connection: Connection) -> None:
    """Answer all cases, one after another."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=SECONDS),
    )
    for seed in seeds:
        connection.send(check_case(random_case(seed, num_ranks)))
    # A rank must not exit while another one still communicates with it.
    dist.barrier()
    dist.destroy_process_group()
