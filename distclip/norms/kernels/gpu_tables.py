"""Build and cache the tables that the GPU kernels read: the tensor of each chunk, and the address of each tensor."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...devices import is_capturing
from .tensor_table import TensorTable, describe_tensors

__all__ = ["CHUNK", "GPUTable", "Launch", "get_table"]

CHUNK = 1 << 16
"""Number of elements that one program of a kernel processes."""


@dataclass(frozen=True)
class Launch:
    """Chunks of all tensors of one dtype, which one kernel launch processes.

    Args:
        dtype: index into `DTYPES`.
        tensor: (chunks,) int64, the index of each chunk's tensor.
        start: (chunks,) int64, the position of each chunk's first element in its tensor.
        first: number of chunks in the launches before this one.
        aligned: whether all tensors of the dtype begin at a multiple of 16 bytes.
    """

    dtype: int
    tensor: Tensor
    start: Tensor
    first: int
    aligned: bool = False


@dataclass(frozen=True)
class GPUTable:
    """Description of n tensors for the GPU kernels.

    Args:
        launches: one for each dtype.
        bounds: (2 n,) int64, the first chunk of each tensor, then the chunk after the last one of each tensor.
        lengths: (n,) int64, number of elements.
        num_chunks: over all tensors.
        has_float64: whether any tensor is float64.
        addresses: (n,) int64.
    """

    launches: tuple[Launch, ...]
    bounds: Tensor
    lengths: Tensor
    num_chunks: int
    has_float64: bool
    addresses: Tensor


_MAX_TABLES = 128
"""Number of tables that are kept: those of some gradients, and of the parameters that 64 steps compare in turn."""

_tables: dict[object, GPUTable] = {}
"""Most recent tables, the oldest one first."""

_captured_tables: list[GPUTable] = []
"""Tables that a CUDA graph reads at each replay, kept alive because the graph has only their addresses."""


def get_table(tensors: Sequence[Tensor], description: TensorTable | None = None) -> GPUTable | None:
    """Return the table of tensors, from the cache if the same memory was described before.

    Args:
        tensors: on one device, at least one.
        description: of the tensors, if they have been described already.

    Returns:
        None if a tensor is not dense or not real, or if a CUDA graph is being captured and these addresses were not
        described before the capture.

    Host syncs: none. Numbers are copied to the device from pinned memory.
    """
    device = tensors[0].device
    table = description or describe_tensors(tensors, device.type)
    if table is None or len(set(map(Tensor.get_device, tensors))) > 1:
        return None
    # Addresses are part of the key, because gradients can move between steps.
    key = (device, bytes(table.lengths), bytes(table.dtypes), bytes(table.addresses))
    if is_capturing():
        # No new table within a capture: each replay would copy it from host memory that has been freed by then.
        if key in _tables:
            _captured_tables.append(_tables[key])
        return _tables.get(key)
    if key not in _tables:
        while len(_tables) >= _MAX_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = _build_table(table, device)
    return _tables[key]


def _build_table(table: TensorTable, device: torch.device) -> GPUTable:
    """Add addresses to the chunks, which depend on lengths and dtypes alone and are cached separately."""
    chunked = _chunk_tensors(device, bytes(table.lengths), bytes(table.dtypes))
    launches = []
    for launch in chunked.launches:
        addresses = (a for a, dtype in zip(table.addresses, table.dtypes, strict=True) if dtype == launch.dtype)
        # Aligned loads are 16 bytes wide. A single unaligned tensor makes the launch use narrow loads.
        launches.append(replace(launch, aligned=all(address % 16 == 0 for address in addresses)))
    return replace(chunked, launches=tuple(launches), addresses=_to_device(table.addresses, device))


@lru_cache(maxsize=16)
def _chunk_tensors(device: torch.device, lengths: bytes, dtypes: bytes) -> GPUTable:
    """Build a table without addresses. Chunks are numbered by dtype, and by tensor within a dtype."""
    lengths_, dtypes_ = array("q", lengths), array("i", dtypes)
    begin, launches, num_chunks = [0] * len(lengths_), [], 0
    # One launch per dtype, because a kernel is compiled for one dtype.
    order = sorted(range(len(lengths_)), key=lambda i: (dtypes_[i], i))
    for dtype in sorted(set(dtypes_)):
        tensor, start, first = array("q"), array("q"), num_chunks
        for i in (i for i in order if dtypes_[i] == dtype):
            begin[i] = num_chunks
            starts = range(0, lengths_[i], CHUNK)
            tensor.extend([i] * len(starts))
            start.extend(starts)
            num_chunks += len(starts)
        # A launch without programs is an error in CUDA: all tensors of this dtype may be empty.
        if num_chunks > first:
            launches.append(Launch(dtype, _to_device(tensor, device), _to_device(start, device), first))
    ends = [b + -(-length // CHUNK) for b, length in zip(begin, lengths_, strict=True)]
    no_addresses = torch.empty(0, dtype=torch.int64)
    bounds = _to_device(array("q", begin + ends), device)
    return GPUTable(tuple(launches), bounds, _to_device(lengths_, device), num_chunks, 0 in dtypes_, no_addresses)


def _to_device(numbers: array[int], device: torch.device) -> Tensor:
    """Copy numbers to the device without a host sync."""
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device=device)
    tensor = torch.frombuffer(bytearray(numbers.tobytes()), dtype=torch.int64)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
