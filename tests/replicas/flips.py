"""Flip single bits of gradients and parameters on one rank of a simulated job, and count which flips are found.

`python -m tests.replicas.flips --flips 10000 --clean 100000` runs a large number of them, on all cores, and prints a
table. The ranks are threads of one process that run one at a time, so that none of them waits for the interpreter.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import distclip
from distclip.errors import ReplicaError
from distclip.extend import Layout, set_layout
from distclip.replicas.scrubber import NUM_PARTS
from distclip.sharding.replicas import replica_group

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

SHAPES = ((7, 5), (33,), (4, 3, 2), (1,))


class Rounds:
    """Collectives of threads that run in turn: each one runs from its turn to its next collective.

    Args:
        size: number of threads.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[list[Any]] = [[None] * size, [None] * size]
        self._turns = [threading.Lock() for _ in range(size)]
        for lock in self._turns[1:]:
            lock.acquire()

    def begin(self, rank: int) -> None:
        """Wait for the turn of a rank."""
        if not self._turns[rank].acquire(timeout=60):
            raise TimeoutError(f"rank {rank} waits for a rank that makes no such call")

    def end(self, rank: int) -> None:
        """Let the next rank run."""
        self._turns[(rank + 1) % self.size].release()


class InTurn:
    """Communicator of one of these threads."""

    ranks: None = None
    device = torch.device("cpu")
    covers_holders = False

    def __init__(self, rank: int, rounds: Rounds) -> None:
        self.rank, self.size, self._rounds, self._number = rank, rounds.size, rounds, 0

    def gather_objects(self, value: Any) -> list[Any]:
        # A thread can be one round ahead of the slowest one, so that two lists are enough.
        values = self._rounds.values[self._number % 2]
        self._number += 1
        values[self.rank] = value
        self._rounds.end(self.rank)
        self._rounds.begin(self.rank)
        return list(values)

    def sum_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).sum(0))

    def max_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).amax(0))


@dataclass
class Tensors:
    """Parameters of one rank: name, parameter, and a key that is equal on the ranks that hold the same shard."""

    named: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def add(self, name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> None:
        """Add a parameter. Without a layout it is a plain tensor."""
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        if layout is not None:
            set_layout(param, layout)
        self.named.append((name, param))
        self.keys.append(key)


def ddp(rank: int, size: int, dtype: torch.dtype) -> Tensors:
    """Replicate every parameter over all ranks."""
    ranks, tensors = tuple(range(size)), Tensors()
    for i, shape in enumerate(SHAPES):
        tensors.add(f"w{i}", f"w{i}", shape, dtype, Layout((ranks,), replicas=replica_group(ranks)))
    return tensors


def hsdp(rank: int, size: int, dtype: torch.dtype) -> Tensors:
    """Shard every parameter over two ranks, and replicate the shards."""
    ranks, tensors = tuple(range(size)), Tensors()
    replicas = replica_group(tuple(range(rank % 2, size, 2)))
    for i, shape in enumerate(SHAPES):
        layout = Layout((ranks,), num_pieces=2, replicas=replicas)
        tensors.add(f"w{i}", f"w{i} of {rank % 2}", shape, dtype, layout)
    return tensors


def tied(rank: int, size: int, dtype: torch.dtype) -> Tensors:
    """Tie the embedding of the first rank to the head of the last one. All other parameters are different shards."""
    ranks, ends, tensors = tuple(range(size)), tuple({0, size // 2, size - 1}), Tensors()
    if rank in ends:
        name = "head" if rank else "embedding"
        tensors.add(name, "embedding", (9, 4), dtype, Layout((ends,), replicas=replica_group(ends)))
    tensors.add("w", f"w of {rank}", (5, 3), dtype, Layout((ranks,), num_pieces=size))
    return tensors


def tp(rank: int, size: int, dtype: torch.dtype) -> Tensors:
    """Shard the weights, and leave the norms plain, so that they are assumed to be replicas."""
    ranks, tensors = tuple(range(size)), Tensors()
    tensors.add("weight", f"weight of {rank}", (6, 4), dtype, Layout((ranks,), num_pieces=size))
    for i in range(3):
        tensors.add(f"norm{i}", f"norm{i}", (8,), dtype, None)
    return tensors


LAYOUTS: dict[str, Callable[[int, int, torch.dtype], Tensors]] = {"ddp": ddp, "hsdp": hsdp, "tied": tied, "tp": tp}


class Job:
    """A job whose ranks are threads, and whose gradients are set from outside.

    Args:
        layout: name of one of `LAYOUTS`.
        size: number of ranks.
        dtype: of all parameters.
        options: of the clippers.
    """

    def __init__(self, layout: str, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.size, self.step = size, 0
        self.tensors = [LAYOUTS[layout](rank, size, dtype) for rank in range(size)]
        self._pool, self._rounds = ThreadPoolExecutor(size), Rounds(size)
        comms = [InTurn(rank, self._rounds) for rank in range(size)]
        options = {"policy": distclip.global_norm(1.0), "replicas": "raise"} | options

        def make(rank: int) -> distclip.GradClipper:
            return distclip.GradClipper(self.tensors[rank].named, comm=comms[rank], **options)

        self.clippers = self.on_ranks(make)
        self.fill()

    def on_ranks(self, call: Callable[[int], Any]) -> list[Any]:
        """Call a function on every rank."""

        def run(rank: int) -> Any:
            self._rounds.begin(rank)
            try:
                return call(rank)
            finally:
                self._rounds.end(rank)

        return list(self._pool.map(run, range(self.size)))

    def fill(self) -> None:
        """Set new gradients, equal ones on all ranks that hold the same shard."""
        self.step += 1
        by_key: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(self.step)
        for own in self.tensors:
            for (_, param), key in zip(own.named, own.keys, strict=True):
                if key not in by_key:
                    by_key[key] = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = by_key[key].clone()

    def holders(self, key: str) -> list[int]:
        """Return the ranks that hold the shard."""
        return [rank for rank, own in enumerate(self.tensors) if key in own.keys]

    def replicated(self) -> list[str]:
        """Return the keys of all shards that several ranks hold."""
        keys = dict.fromkeys(key for own in self.tensors for key in own.keys)
        return [key for key in keys if len(self.holders(key)) > 1]

    def param(self, rank: int, key: str) -> tuple[str, nn.Parameter]:
        """Return the name and the parameter of a rank that holds a shard."""
        own = self.tensors[rank]
        return own.named[own.keys.index(key)]

    def clip(self) -> list[Any]:
        """Clip on all ranks. Return the report or the ReplicaError of each."""
        return self.on_ranks(self._clip_rank)

    def _clip_rank(self, rank: int) -> Any:
        try:
            return self.clippers[rank].clip()
        except ReplicaError as error:
            return error

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def flip(tensor: Tensor, index: int, bit: int) -> None:
    """Flip one bit of one element."""
    words = tensor.detach().view(-1).view(INTEGERS[tensor.element_size()])
    last = 8 * tensor.element_size() - 1
    words[index] ^= -(1 << bit) if bit == last else 1 << bit


def run_flips(job: Job, count: int, generator: random.Random) -> Iterator[str]:
    """Flip bits one after another, and yield what happened to each: "found", or what went wrong."""
    for _ in range(count):
        job.fill()
        key, kind = generator.choice(job.replicated()), generator.choice(["gradient", "parameter"])
        holders = job.holders(key)
        rank = generator.choice(holders)
        name, param = job.param(rank, key)
        tensor = param if kind == "parameter" or param.grad is None else param.grad
        index, bit = generator.randrange(tensor.numel()), generator.randrange(8 * tensor.element_size())
        flip(tensor, index, bit)
        answers: list[Any] = []
        for _ in range(NUM_PARTS if kind == "parameter" else 1):
            answers = job.clip()
            if any(isinstance(answer, ReplicaError) for answer in answers):
                break
        if kind == "parameter":
            flip(tensor, index, bit)
        yield _judgement(job, answers, kind, rank, name, holders)


def _judgement(job: Job, answers: list[Any], kind: str, rank: int, name: str, holders: list[int]) -> str:
    if not all(isinstance(answer, ReplicaError) for answer in answers):
        return "not detected"
    incidents = [clipper.incidents[-1] for clipper in job.clippers]
    if any(incident != incidents[0] for incident in incidents):
        return "ranks disagree"
    (culprit,) = incidents[0].culprits
    if culprit.kind != kind or name not in culprit.names:
        return "tensor not identified"
    expected = (rank,) if len(holders) > 2 else tuple(holders)
    return "found" if culprit.ranks == expected else "rank not identified"


def run_clean(job: Job, steps: int) -> int:
    """Take steps without a flip, and return the number of alarms."""
    alarms = 0
    for _ in range(steps):
        job.fill()
        alarms += any(isinstance(answer, ReplicaError) for answer in job.clip())
    return alarms


JOBS = [
    (layout, size, dtype)
    for layout in LAYOUTS
    for size in (2, 3, 4, 8)
    for dtype in (torch.float32, torch.bfloat16)
    if layout != "hsdp" or size in (4, 8)
]
"""Layouts, numbers of ranks and dtypes of all jobs."""


def main() -> None:
    """Run the given number of flips and clean steps, spread over all jobs, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--clean", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    flips, clean = -(-options.flips // len(JOBS)), -(-options.clean // len(JOBS))
    # The longest jobs come first, so that all cores end at about the same time.
    jobs = sorted(JOBS, key=lambda job: -job[1])
    os.environ["OMP_NUM_THREADS"] = "1"
    total, alarms = Counter[str](), 0
    with ProcessPoolExecutor(mp_context=mp.get_context("spawn")) as pool:
        results = [pool.submit(run_job, *job, flips, clean, options.seed + i) for i, job in enumerate(jobs)]
        for (layout, size, dtype), result in zip(jobs, results, strict=True):
            counts, alarms_of_job = result.result()
            print(
                f"{layout:5} {size} ranks {str(dtype)[6:]:8} {dict(counts)}, {alarms_of_job} false alarms", flush=True
            )
            total, alarms = total + counts, alarms + alarms_of_job
    print(f"all: {dict(total)} of {total.total()} flips, {alarms} false alarms in {clean * len(JOBS)} clean steps")


def run_job(layout: str, size: int, dtype: torch.dtype, flips: int, clean: int, seed: int) -> tuple[Counter[str], int]:
    """Run the flips and the clean steps of one job. Return what happened to each flip, and the number of alarms."""
    torch.set_num_threads(1)
    job = Job(layout, size, dtype)
    counts, alarms = Counter(run_flips(job, flips, random.Random(seed))), run_clean(job, clean)
    job.close()
    return counts, alarms


if __name__ == "__main__":
    main()
