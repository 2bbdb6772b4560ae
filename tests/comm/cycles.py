"""Destroy and create the process groups of a program many times, and count what is left.

`python tests/comm/cycles.py [--cycles 1000]` does so on two ranks: initialize, clip shards and replicas, record,
`rebind` onto the next process group, destroy.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distclip
from distclip import GradClipper
from distclip.monitor import Recorder
from tests.forks import forkserver

NUM_RANKS = 2
WARM_UP = 5
"""Cycles before the first count. Modules are imported and caches are filled in them."""

Counts = dict[str, int]


def count() -> Counts:
    """Return the numbers of threads, files and objects of this process."""
    gc.collect()
    kinds = Counter(type(one).__name__ for one in gc.get_objects())
    names = (
        "ProcessGroup",
        "ProcessGroupGloo",
        "GradClipper",
        "Engine",
        "ShardTable",
        "DTensor",
        "DeviceMesh",
        "Recorder",
    )
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "sessions": len(distclip.comm.discovery._sessions),
        **{name: kinds[name] for name in names},
    }


def is_right(norm: torch.Tensor) -> bool:
    """Return whether a norm is that of 11 ones."""
    return abs(float(norm) - 11**0.5) < 1e-6


def cycle(rank: int, store: dist.Store, folder: Path, kept: GradClipper | None) -> GradClipper:
    """Initialize, train for two steps, and destroy. Return a clipper that outlives its process groups."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("dp",))
    params = {
        "shard": nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])),
        "replica": nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()])),
    }
    clipper = GradClipper(list(params.items()), distclip.ema())
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    with Recorder(clipper, folder / "run", every=1) as recorder:
        for _ in range(2):
            for param in params.values():
                param.grad = torch.ones_like(param)
            report = clipper.step(optimizer)
            recorder.note(loss=1.0)
    assert isinstance(params["shard"], DTensor)
    assert is_right(report.norm)
    assert is_right(distclip.clip_grad_norm_(params.values(), 100.0))
    if kept is not None:
        # A job that continues within the process has its clipper of before.
        kept.rebind(list(params.items()))
        clipper = kept
        assert is_right(clipper.step(optimizer).norm)
    dist.barrier()
    dist.destroy_process_group()
    return clipper


def run_rank(rank: int, num_cycles: int, port: int, folder: str, results: Any) -> None:
    """Run all cycles of one rank, and send the counts after the warm-up and at the end."""
    torch.set_num_threads(1)
    kept, counts = None, []
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    for i in range(num_cycles):
        path = Path(folder, str(i))
        path.mkdir(exist_ok=True)
        kept = cycle(rank, dist.PrefixStore(str(i), store), path, kept)
        if i + 1 in (WARM_UP, num_cycles):
            counts.append(count())
    results.put((rank, counts))


def run(num_cycles: int) -> dict[int, list[Counts]]:
    """Return the counts of each rank."""
    context = forkserver()
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=run_rank, args=(rank, num_cycles, store.port, folder, results), daemon=True)
            for rank in range(NUM_RANKS)
        ]
        for rank in ranks:
            rank.start()
        counts = dict(results.get(timeout=60 + num_cycles) for _ in ranks)
        for rank in ranks:
            rank.join()
    return counts


def growth(counts: list[Counts]) -> Counts:
    """Return the numbers that have grown since the warm-up."""
    first, last = counts
    return {name: last[name] - first[name] for name in last if last[name] > first[name]}


def main() -> None:
    """Run from the command line, and exit with status 1 if anything has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    num_cycles = parser.parse_args().cycles
    begin, counts = time.monotonic(), run(num_cycles)
    print(f"{num_cycles} cycles in {time.monotonic() - begin:.0f} s")
    for rank, by_time in sorted(counts.items()):
        print(f"rank {rank}: {by_time[-1]}, growth {growth(by_time) or 'none'}")
    sys.exit(any(map(growth, counts.values())))


if __name__ == "__main__":
    main()
