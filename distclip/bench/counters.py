"""Count the costs of a call other than time, in separate calls that are not timed."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..norms import kernels
from ..norms.kernels.tensor_table import TensorTable
from ..sharding.shard import Rows
from .competitors import Competitor, Setup

__all__ = ["Counts", "count", "peak_bytes"]

CHUNK = 1 << 22
"""Number of elements that the oracle converts to float64 at a time."""


@dataclass(frozen=True)
class Counts:
    """Costs of one call on one rank.

    Args:
        bytes_read: bytes of gradients that torch's dispatched operators and distclip's kernels read.
        bytes_written: bytes of gradients that torch's dispatched operators write, and at least the bytes of all changed
            gradients.
        collectives: number of collectives of any kind.
        peak_bytes: highest amount of memory allocated during the call, above the amount before it.
        norm_error: error relative to a float64 norm. None if the call returns no norm.
        host_syncs: on CUDA, number of host syncs.
        kernels: on CUDA, number of kernel launches.
    """

    bytes_read: int
    bytes_written: int
    collectives: int
    peak_bytes: int
    norm_error: float | None
    host_syncs: int | None
    kernels: int | None


def count(setup: Setup, competitor: Competitor) -> Counts:
    """Call a competitor several times, and count one kind of cost in each call.

    Args:
        setup: the gradients.
        competitor: the competitor, the same on all ranks.
    """
    cuda = setup.grads()[0].device.type == "cuda"
    call = competitor.call
    competitor.prepare()
    with Traffic(setup.grads()) as traffic, traffic.include_kernels():
        call()
    competitor.prepare()
    # This import is here because it needs NumPy, which torch does not install.
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as collectives:  # type: ignore[no-untyped-call]
        call()
    competitor.prepare()
    peak = _peak_on_cuda(call) if cuda else peak_bytes(call)
    host_syncs = kernels = None
    if cuda:
        competitor.prepare()
        host_syncs = _host_syncs(call)
        competitor.prepare()
        kernels = _kernels(call)
    competitor.prepare()
    truth = norm64(setup.parameters)
    grads = setup.grads()
    before = [grad.clone() for grad in grads]
    norm = call()
    # Writes that bypass torch's operators only show as changed gradients.
    changed = sum(g.nbytes for g, old in zip(grads, before, strict=True) if not torch.equal(g, old))
    written = max(traffic.written, changed)
    error = _error(norm, truth)
    return Counts(traffic.read, written, collectives.get_total_counts(), peak, error, host_syncs, kernels)


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of some storages that operators read and write.

    Args:
        tensors: tensors whose storages are counted.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = self.written = 0
        self._storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The operator of a DTensor or an AsyncCollectiveTensor is dispatched again for the plain tensor inside.
        if any(type(tensor) not in (Tensor, Parameter) for tensor in _tensors((args, kwargs))):
            return NotImplemented
        if not func.is_view and not func._schema.name.endswith("_like"):
            self.read += self._bytes((args, kwargs))
            self.written += self._bytes(_written_arguments(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def include_kernels(self) -> Iterator[None]:
        """Count the reads of distclip's kernels too, which torch does not dispatch."""
        power_sums, by_row = kernels.fused_power_sums, kernels.native.powers_by_row

        def count_power_sums(
            tensors: Sequence[Tensor],
            norm_type: float,
            description: TensorTable | None = None,
            with_checksums: bool = False,
        ) -> kernels.Powers | None:
            sums = power_sums(tensors, norm_type, description, with_checksums)
            self.read += 0 if sums is None else self._bytes(tensors)
            return sums

        def count_by_row(
            grads: Sequence[Tensor],
            rows: Sequence[Rows],
            norm_type: float,
            out: tuple[Tensor, Sequence[int]] | None = None,
        ) -> Tensor | None:
            powers = by_row(grads, rows, norm_type, out)
            self.read += 0 if powers is None else self._bytes(grads)
            return powers

        kernels.fused_power_sums, kernels.native.powers_by_row = count_power_sums, count_by_row
        try:
            yield
        finally:
            kernels.fused_power_sums, kernels.native.powers_by_row = power_sums, by_row

    def _bytes(self, values: Any) -> int:
        return sum(t.nbytes for t in _tensors(values) if t.untyped_storage().data_ptr() in self._storages)


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operator writes to."""
    arguments = func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    writes = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    # The schemas of fused optimizers declare gradients as written, but only unscaling writes them.
    if "grad_scale" in (a.name for a in arguments) and given.get("grad_scale") is None:
        writes.discard("grads")
    return [given.get(name) for name in writes]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def norm64(parameters: Sequence[Tensor]) -> float:
    """Compute the norm of the whole gradient in float64. DTensors are gathered."""
    squares = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            flat = (grad.full_tensor() if isinstance(grad, DTensor) else grad).reshape(-1)
            squares += [float(torch.dot(wide, wide)) for wide in (part.double() for part in torch.split(flat, CHUNK))]
    return math.sqrt(math.fsum(squares))


def _error(norm: Tensor | None, truth: float) -> float | None:
    if norm is None:
        return None
    value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return abs(value - truth) / truth


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of the CPU memory that a call allocates.

    The profiler's allocations are used because the peak memory of the process also depends on earlier calls.
    """
    activities = [ProfilerActivity.CPU]
    # Without acc_events torch 2.10 warns about profiling cycles, which this call does not use.
    with _without_stderr(), profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard the output of the profiler, which writes to file descriptor 2 and not to sys.stderr."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _peak_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _host_syncs(call: Callable[[], object]) -> int:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    # The mode also causes one warning about itself, which is not counted.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def _kernels(call: Callable[[], object]) -> int:
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with _without_stderr(), profile(activities=activities, acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in profiler.events())
