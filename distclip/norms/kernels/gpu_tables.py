"""The tables that the GPU kernels read: which chunk is whose, made once, and where the tensors are at the moment."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .tensor_table import Description, describe

__all__ = ["CHUNK", "Part", "Table", "table_of"]

CHUNK = 1 << 16
"""Elements for a program."""


@dataclass(frozen=True)
class Part:
    """The chunks of all tensors of one dtype: a launch.

    Args:
        dtype: its place in `DTYPES`.
        tensor: (chunks,) int64, whose each chunk is.
        start: (chunks,) int64, at which of its elements it begins.
        first: how many chunks come before those of this part.
        aligned: whether all tensors begin at a multiple of 16 bytes.
    """

    dtype: int
    tensor: Tensor
    start: Tensor
    first: int
    aligned: bool = False


@dataclass(frozen=True)
class Table:
    """What kernels know of n tensors.

    Args:
        parts: one for each dtype.
        bounds: (2 n,) int64, the first chunk of each tensor, and then the one after its last.
        lengths: (n,) int64, elements.
        chunks: how many there are.
        wide: whether some tensor is float64.
        addresses: (n,) int64.
    """

    parts: tuple[Part, ...]
    bounds: Tensor
    lengths: Tensor
    chunks: int
    wide: bool
    addresses: Tensor


_LIMIT = 16

_recent: dict[object, Table] = {}


def table_of(tensors: Sequence[Tensor]) -> Table | None:
    """The table of tensors, from the last ones where nothing has changed.

    Args:
        tensors: of one device, at least one.

    Returns:
        None where there is none: a tensor is not dense or not real, or a CUDA graph is being captured and the tensors
        are not where they were in an earlier call (a copy from the host would be replayed from memory that has gone).

    Host syncs: none; what travels to the device travels from pinned memory.
    """
    device = tensors[0].device
    found = describe(tensors, device.type)
    if found is None or len(set(map(Tensor.get_device, tensors))) > 1:
        return None
    key = (device, bytes(found.lengths), bytes(found.dtypes), bytes(found.addresses))
    if _capturing(device):
        if key in _recent:
            _captured.append(_recent[key])
        return _recent.get(key)
    if key not in _recent:
        while len(_recent) >= _LIMIT:
            del _recent[next(iter(_recent))]
        _recent[key] = _made(found, device)
    return _recent[key]


_captured: list[Table] = []
"""What a CUDA graph reads whenever it is replayed."""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _made(found: Description, device: torch.device) -> Table:
    """A table whose chunks are those of the last one with the same lengths and dtypes."""
    chunked = _chunked(device, bytes(found.lengths), bytes(found.dtypes))
    parts = []
    for part in chunked.parts:
        addresses = (a for a, dtype in zip(found.addresses, found.dtypes, strict=True) if dtype == part.dtype)
        parts.append(replace(part, aligned=all(address % 16 == 0 for address in addresses)))
    return replace(chunked, parts=tuple(parts), addresses=_there(found.addresses, device))


@lru_cache(maxsize=16)
def _chunked(device: torch.device, lengths: bytes, dtypes: bytes) -> Table:
    """A table without addresses. Chunks are numbered tensor by tensor, dtype by dtype."""
    counts, kinds = array("q", lengths), array("i", dtypes)
    begin, parts, chunks = [0] * len(counts), [], 0
    order = sorted(range(len(counts)), key=lambda i: (kinds[i], i))
    for dtype in sorted(set(kinds)):
        tensor, start, first = array("q"), array("q"), chunks
        for i in (i for i in order if kinds[i] == dtype):
            begin[i] = chunks
            starts = range(0, counts[i], CHUNK)
            tensor.extend([i] * len(starts))
            start.extend(starts)
            chunks += len(starts)
        if chunks > first:
            parts.append(Part(dtype, _there(tensor, device), _there(start, device), first))
    ends = [b + -(-count // CHUNK) for b, count in zip(begin, counts, strict=True)]
    nowhere = torch.empty(0, dtype=torch.int64)
    bounds = _there(array("q", begin + ends), device)
    return Table(tuple(parts), bounds, _there(counts, device), chunks, 0 in kinds, nowhere)


def _there(numbers: array[int], device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    table = torch.frombuffer(bytearray(numbers.tobytes()), dtype=torch.int64) if len(numbers) else torch.empty(0).long()
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
