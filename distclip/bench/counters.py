"""What a call costs beside time, counted in calls of their own that nobody times."""

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
from ..sharding.shard import Rows
from .competitors import Contestant, Setup

__all__ = ["Counts", "count", "peak_bytes"]

CHUNK = 1 << 22
"""Elements that the oracle widens at a time."""


@dataclass(frozen=True)
class Counts:
    """Of one call on one rank.

    Args:
        bytes_read: of gradients, by operators that torch dispatches and by kernels of distclip's own.
        bytes_written: of gradients, by operators that torch dispatches, and at least of those that have changed.
        collectives: of any kind.
        peak_bytes: memory allocated on top of what was there before, at its highest.
        norm_error: relative, against a float64 norm; None where no norm is returned.
        host_syncs: on CUDA, how often the host waited for the device.
        kernels: on CUDA, how many were launched.
    """

    bytes_read: int
    bytes_written: int
    collectives: int
    peak_bytes: int
    norm_error: float | None
    host_syncs: int | None
    kernels: int | None


def count(setup: Setup, contestant: Contestant) -> Counts:
    """Call a contestant several times, and count something else in each.

    Args:
        setup: what the contestant works on.
        contestant: who is called; on all ranks alike.
    """
    cuda = setup.grads()[0].device.type == "cuda"
    call = contestant.call
    contestant.prepare()
    with Traffic(setup.grads()) as traffic, traffic.of_kernels():
        call()
    contestant.prepare()
    # It needs NumPy, which torch does not bring.
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as collectives:  # type: ignore[no-untyped-call]
        call()
    contestant.prepare()
    peak = _peak_on_cuda(call) if cuda else peak_bytes(call)
    host_syncs = kernels = None
    if cuda:
        contestant.prepare()
        host_syncs = _host_syncs(call)
        contestant.prepare()
        kernels = _kernels(call)
    contestant.prepare()
    truth = norm64(setup.parameters)
    grads = setup.grads()
    before = [grad.clone() for grad in grads]
    norm = call()
    # What is written past torch's operators shows nowhere else.
    changed = sum(g.nbytes for g, old in zip(grads, before, strict=True) if not torch.equal(g, old))
    written = max(traffic.written, changed)
    error = _error(norm, truth)
    return Counts(traffic.read, written, collectives.get_total_counts(), peak, error, host_syncs, kernels)


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up how many bytes of some storages operators are given to read and to write.

    Args:
        tensors: whose storages are watched.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = self.written = 0
        self._storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The operator of a DTensor (or of one that is still being reduced) comes again, for the plain one within.
        if any(type(each) not in (Tensor, Parameter) for each in _tensors((args, kwargs))):
            return NotImplemented
        if not func.is_view and not func._schema.name.endswith("_like"):
            self.read += self._bytes((args, kwargs))
            self.written += self._bytes(_written(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def of_kernels(self) -> Iterator[None]:
        """Count also what distclip's own kernels read, which torch does not dispatch."""
        whole, by_row = kernels.fused_power_sums, kernels.native.row_powers

        def counted(tensors: Sequence[Tensor], norm_type: float) -> tuple[Tensor, bool] | None:
            found = whole(tensors, norm_type)
            self.read += 0 if found is None else self._bytes(tensors)
            return found

        def counted_rows(grad: Tensor, rows: Rows, norm_type: float) -> Tensor | None:
            found = by_row(grad, rows, norm_type)
            self.read += 0 if found is None else self._bytes(grad)
            return found

        kernels.fused_power_sums, kernels.native.row_powers = counted, counted_rows
        try:
            yield
        finally:
            kernels.fused_power_sums, kernels.native.row_powers = whole, by_row

    def _bytes(self, values: Any) -> int:
        return sum(t.nbytes for t in _tensors(values) if t.untyped_storage().data_ptr() in self._storages)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    arguments = func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    writes = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    # Fused optimizers claim to write gradients, and do where these are to be unscaled.
    if "grad_scale" in (a.name for a in arguments) and given.get("grad_scale") is None:
        writes.discard("grads")
    return [given.get(name) for name in writes]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def norm64(parameters: Sequence[Tensor]) -> float:
    """The norm of the whole gradient, in float64; gathers what is spread."""
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
    found = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return abs(found - truth) / truth


def peak_bytes(call: Callable[[], object]) -> int:
    """What a call has allocated on a CPU at its highest, by torch's allocator: the process' own high-water mark also
    moves with what was freed before."""
    activities = [ProfilerActivity.CPU]
    # Without acc_events torch 2.10 warns, of cycles that there are none of.
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
    """The profiler talks to file descriptor 2, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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
    # Not the one that says what this mode is.
    return sum("called a synchronizing" in str(each.message) for each in caught)


def _kernels(call: Callable[[], object]) -> int:
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with _without_stderr(), profile(activities=activities, acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in profiler.events())
