"""Count the costs of each rank of a large job before its first step: `--cases rendezvous slots --ranks 256 65536`.

All ranks are simulated in this process. In a rendezvous, every rank runs (`simulated`). For slots, ranks with the same
parameters do the same work, so only the lowest of them runs, and one more that represents the others.
"""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ..comm.ranks import Axis, Grid, Ranks
from ..comm.rendezvous import Known, Post, Rendezvous, derive_component
from ..devices import free_host_memory
from ..policies import per_tensor_norm
from ..sharding.layout import Layout
from ..sharding.slots import assign_slots, describe_params, exchange_params
from ..sharding.table import ShardTable, TableMetadata
from .errors import BenchError
from .simulated import run_ranks

__all__ = ["LAYOUTS", "SCALE", "Costs", "RankLayout", "measure_rendezvous", "measure_scale", "measure_slots"]

NUM_PARAMS = 1000
"""Number of parameters of the simulated model."""

NUM_STAGES, WIDTH = 4, 8
"""Number of pipeline stages, and of ranks in a tensor-parallel or expert-parallel group."""

MAX_OPERATIONS, MAX_BYTES = 8, 4096
"""Budget of one rank in a rendezvous."""

MAX_SEARCH_BYTES = 64 * 1024
"""Budget of one rank in a search."""

_BYTES_PER_RANK = 8192
"""Memory in bytes that a simulated rank takes in this process."""

_SAMPLE = 16
"""Number of ranks that derive their component in the simulation."""

MAX_SLOT_BYTES, MAX_SLOT_SECONDS = 2_000_000, 1.0
"""Budget of one rank for slots."""


@dataclass(frozen=True)
class RankLayout:
    """Meshes, axes and parameters of one rank.

    Args:
        groups: ranks of each mesh.
        axes: axes of `split_over=`.
        params: (number of parameters, name, layout) of each kind of parameter.
    """

    groups: Sequence[Ranks]
    axes: tuple[Axis, ...]
    params: Sequence[tuple[int, str, Layout]]


@dataclass(frozen=True)
class Costs:
    """Costs of the ranks of one simulated job.

    Args:
        case: "rendezvous", "search" or "slots".
        layout: name of the layout.
        num_ranks: size of the job.
        operations, sent, received: largest number of store operations and of bytes of any rank.
        cpu_seconds: CPU seconds of one rank.
        peak_bytes: memory that one rank allocates.
        store_operations, store_bytes: sums over all ranks, for a rendezvous.
        wall_seconds: wall-clock seconds of the simulation.
    """

    case: str
    layout: str
    num_ranks: int
    operations: int
    sent: int
    received: int
    cpu_seconds: float
    peak_bytes: int
    store_operations: int
    store_bytes: int
    wall_seconds: float

    @property
    def is_within_budget(self) -> bool:
        """True if no rank exceeds the budget of its case."""
        if self.case == "rendezvous":
            return self.operations <= MAX_OPERATIONS and self.sent + self.received <= MAX_BYTES
        if self.case == "search":
            return self.sent + self.received <= MAX_SEARCH_BYTES
        return max(self.sent, self.received) <= MAX_SLOT_BYTES and self.cpu_seconds <= MAX_SLOT_SECONDS


class _Job:
    """Groups of a job of some size. All ranks of a group share one object."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.everyone = tuple(range(size))
        self.stages = [tuple(range(i * size // NUM_STAGES, (i + 1) * size // NUM_STAGES)) for i in range(NUM_STAGES)]
        self.pp_grid = Grid((NUM_STAGES, size // NUM_STAGES // WIDTH, WIDTH), self.everyone)
        self.ep_grid = Grid((size // WIDTH, WIDTH), self.everyone)
        self._lines: dict[tuple[int, int], Ranks] = {}

    def line(self, rank: int, step: int, length: int) -> Ranks:
        """Return the ranks at distances of `step` that include a rank."""
        start = rank // (step * length) * step * length + rank % step
        if (start, step) not in self._lines:
            self._lines[start, step] = tuple(range(start, start + step * length, step))
        return self._lines[start, step]


def _whole(job: _Job, num_pieces: int) -> RankLayout:
    return RankLayout([job.everyone], (), [(NUM_PARAMS, "layers", Layout((job.everyone,), num_pieces))])


def _stages(job: _Job, rank: int) -> RankLayout:
    width = job.size // NUM_STAGES
    stage, axis = rank // width, Axis(job.line(rank, width, NUM_STAGES), "pp", "", job.pp_grid)
    layout = Layout((job.stages[stage],), width, (True,), (False,))
    return RankLayout([job.stages[stage]], (axis,), [(NUM_PARAMS // NUM_STAGES, f"stages.{stage}", layout)])


def _experts(job: _Job, rank: int) -> RankLayout:
    num_replicas = job.size // WIDTH
    mesh, axis = job.line(rank, WIDTH, num_replicas), Axis(job.line(rank, 1, WIDTH), "ep", "", job.ep_grid)
    dense = Layout((job.everyone,), job.size, (False,), (False,))
    expert = Layout((mesh,), num_replicas, (True,), (False,))
    half = NUM_PARAMS // 2
    return RankLayout([job.everyone, mesh], (axis,), [(half, "dense", dense), (half, "experts", expert)])


LAYOUTS: dict[str, Callable[[Any, int], RankLayout]] = {
    "FSDP2": lambda job, rank: _whole(job, job.size),
    "HSDP": lambda job, rank: _whole(job, WIDTH),
    "FSDP2 x TP": lambda job, rank: _whole(job, job.size),
    "PP x FSDP2 x TP": _stages,
    "FSDP2 + experts": _experts,
}
"""Layout of a rank, from the job and the rank."""

_CLASSES = {"PP x FSDP2 x TP": NUM_STAGES, "FSDP2 + experts": WIDTH}
"""Number of different sets of parameters. Ranks of a stage are consecutive, and ranks of an expert alternate."""


def measure_search(layout: str, size: int) -> Costs:
    """Simulate the rendezvous of ranks that must search for each other.

    Args, Raises: see `measure_rendezvous`.
    """
    return measure_rendezvous(layout, size, searches=True)


def measure_rendezvous(layout: str, size: int, *, searches: bool = False) -> Costs:
    """Simulate the rendezvous of all ranks of a job.

    Args:
        layout: key of `LAYOUTS`.
        size: number of ranks, a multiple of 32.
        searches: whether the ranks search for each other, because no rank derives the component.

    Raises:
        BenchError: another number of ranks.
    """
    start, job = time.monotonic(), _checked_job(size)
    make = LAYOUTS[layout]
    cpu, peak = _measure(lambda: _known(make(_Job(size), 1), 1, size))
    # Every rank derives the same component, in a time that grows with the job. A few ranks are enough to check that.
    sample = {_known(make(job, rank), rank, size) for rank in range(0, size, max(1, size // _SAMPLE))}
    if len(sample) > 1:
        raise BenchError(f"rendezvous of {layout}: the ranks derive {len(sample)} different components.")
    known = None if searches else sample.pop()

    def post(rank: int) -> Post:
        here = make(job, rank)
        return Post((*here.groups, *(axis.ranks for axis in here.axes)), here.axes, known=known)

    posts = list(map(post, range(size)))
    begin = time.process_time()
    results, costs = run_ranks(
        lambda store: len(Rendezvous(store, store.rank, store).join(posts[store.rank], timedelta(minutes=30)).ranks),
        size,
    )
    cpu += (time.process_time() - begin) / size
    if set(results) != {size}:
        raise BenchError(f"rendezvous of {layout}: it found {set(results)} of {size} ranks.")
    operations = [one.operations for one in costs]
    sent, received = [one.sent for one in costs], [one.received for one in costs]
    return Costs(
        *("search" if searches else "rendezvous", layout, size, max(operations), max(sent), max(received), cpu, peak),
        *(sum(operations), sum(sent) + sum(received), time.monotonic() - start),
    )


def measure_slots(layout: str, size: int) -> Costs:
    """Simulate the exchange of descriptions and the assignment of slots.

    Args:
        layout: key of `LAYOUTS`.
        size: number of ranks, a multiple of 32.

    Raises:
        BenchError: another number of ranks.
    """
    start, job = time.monotonic(), _checked_job(size)
    num_classes = _CLASSES.get(layout, 1)
    # Each class has its lowest rank, and the next one, which represents all others of the class.
    step = size // NUM_STAGES if layout == "PP x FSDP2 x TP" else 1
    stride = 1 if step > 1 else num_classes
    lowest = [number * step for number in range(num_classes)]
    weights = [(rank, 1) for rank in lowest] + [(rank + stride, size // num_classes - 1) for rank in lowest]
    exchange = _Exchange(len(weights))
    comms = [_WeightedComm(exchange, i, rank, size, weight) for i, (rank, weight) in enumerate(weights)]
    tables = [_table(LAYOUTS[layout](job, rank), rank, size) for rank, _ in weights]
    spec = per_tensor_norm(1.0).spec

    def make(comm: Any, table: ShardTable) -> int:
        return assign_slots(*exchange_params(comm, None, describe_params(table, comm.rank, spec, None)), spec).total

    with ThreadPoolExecutor(len(comms)) as pool:
        totals = set(pool.map(make, comms, tables))
    if len(totals) != 1:
        raise BenchError(f"slots of {layout}: the ranks found {sorted(totals)} slots.")
    # One rank runs again alone, on new objects, with the answers that it received.
    fresh = _table(LAYOUTS[layout](_Job(size), 0), 0, size)
    cpu, peak = _measure(lambda: make(_RecordedComm(comms[0]), fresh))
    num_bytes = sum(vector.nbytes for vector in comms[0].answers)
    return Costs("slots", layout, size, 0, num_bytes, num_bytes, cpu, peak, 0, 0, time.monotonic() - start)


SCALE: dict[str, Callable[[str, int], Costs]] = {
    "rendezvous": measure_rendezvous,
    "search": measure_search,
    "slots": measure_slots,
}
"""Cases that simulate large jobs, by name."""


def measure_scale(cases: Sequence[str], sizes: Sequence[int]) -> Iterator[Costs]:
    """Measure every layout in jobs of some sizes."""
    for case in cases:
        for size in sizes:
            for layout in LAYOUTS:
                yield SCALE[case](layout, size)


def _checked_job(size: int) -> _Job:
    if size < 1 or size % (NUM_STAGES * WIDTH):
        raise BenchError(f"--ranks {size}: not a multiple of {NUM_STAGES * WIDTH}. Pass one, such as 256.")
    if size * _BYTES_PER_RANK > (free := free_host_memory()):
        raise BenchError(
            f"--ranks {size}: each simulated rank needs about {_BYTES_PER_RANK // 1024} KiB, and "
            f"{free / 2**20:.0f} MiB of memory are free. Pass at most {free // _BYTES_PER_RANK // 32 * 32}."
        )
    return _Job(size)


def _known(here: RankLayout, rank: int, size: int) -> Known | None:
    return derive_component(here.groups, here.axes, rank, size)


def _table(here: RankLayout, rank: int, size: int) -> ShardTable:
    """Return the table of one rank. Only names, shapes and layouts matter."""
    entries = [
        # Each parameter has a separate layout, as for DTensors.
        (f"{prefix}.{i}.weight", torch.nn.Parameter(torch.zeros(2)), Layout(*_fields(layout)))
        for number, prefix, layout in here.params
        for i in range(number)
    ]
    table = ShardTable([tensor for _, tensor, _ in entries], TableMetadata(entries, here.axes))
    table.world_size = size
    return table


def _fields(layout: Layout) -> tuple[Any, ...]:
    return layout.groups, layout.num_pieces, layout.split, layout.cut


def _measure(function: Callable[[], object]) -> tuple[float, int]:
    """Return the CPU seconds of a function, and the peak of its memory in bytes in a second call."""
    begin = time.thread_time()
    function()
    seconds = time.thread_time() - begin
    tracemalloc.start()
    try:
        function()
        return seconds, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class _Exchange:
    """Vectors of the threads that represent all ranks."""

    def __init__(self, size: int) -> None:
        self.vectors: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=300.0)


class _WeightedComm:
    """Communicator of a thread that represents several ranks with the same parameters.

    Args:
        exchange: the exchange that all threads share.
        index: index of the thread.
        rank: the lowest rank that it represents.
        size: number of ranks of the job.
        weight: number of ranks that it represents.
    """

    ranks: None = None
    device: None = None
    covers_holders = False

    def __init__(self, exchange: _Exchange, index: int, rank: int, size: int, weight: int) -> None:
        self._exchange, self._index, self._weight = exchange, index, weight
        self.rank, self.size = rank, size
        self.answers: list[Tensor] = []

    def sum_(self, tensor: Tensor) -> None:
        """Add up the vectors of all ranks."""
        tensor.copy_(self._all(tensor * self._weight).sum(0))
        self.answers.append(tensor.clone())

    def max_(self, tensor: Tensor) -> None:
        """Take the maximum over all ranks."""
        tensor.copy_(self._all(tensor.clone()).amax(0))
        self.answers.append(tensor.clone())

    def gather_objects(self, value: Any) -> list[Any]:
        """Refuse: a gather grows with the number of ranks."""
        raise BenchError("slots: a gather of every rank's parameters.")

    def _all(self, vector: Tensor) -> Tensor:
        self._exchange.vectors[self._index] = vector
        self._exchange.barrier.wait()
        vectors = torch.stack(list(self._exchange.vectors))
        self._exchange.barrier.wait()
        return vectors


class _RecordedComm:
    """Communicator that repeats the answers that a thread received."""

    ranks: None = None
    device: None = None
    covers_holders = False

    def __init__(self, comm: _WeightedComm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._answers = iter(comm.answers)

    def sum_(self, tensor: Tensor) -> None:
        """Write the recorded answer."""
        tensor.copy_(next(self._answers))

    max_ = sum_

    def gather_objects(self, value: Any) -> list[Any]:
        """Refuse, see `_WeightedComm`."""
        raise BenchError("slots: a gather of every rank's parameters.")
