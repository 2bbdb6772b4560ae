"""Sums of powers with torch's operators: any tensor, any p, any device.

What they add up is float64, whatever the gradient's own dtype. On a CPU a large Euclidean sum is first made in float32,
by rows so short that nothing is lost, and again in float64 where float32 cannot hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...devices import accumulation_dtype
from ...sharding.shard import Rows

__all__ = ["combine", "identity", "is_dense", "power_sum", "power_sums", "row_index", "row_powers"]

_CHUNK = {"cpu": 1 << 17}
"""Elements widened at a time, so that the temporary does not grow with the model; on a CPU it stays in the cache."""

_ROW = 512
"""Elements added up in float32. torch's row norms have at least eight sums side by side: 64 additions each, too few to
lose 1e-7 of an average, whereas a dot product of a million equal elements is 1e-4 off."""

_ROWS = 1 << 11
"""How many rows at a time: 4 MB."""

_UNDERFLOW = 1.2e-31
"""A float32 sum of n squares is right if it is finite and at least n times this: squares below 1.2e-38, which float32
cannot hold, are then less than 1e-7 of it."""


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Σ|g|^p of each tensor, (n,) float64 on their device: see `power_sum`.

    Args:
        tensors: at least one; all of one device and dtype, and dense or not dense.
        norm_type: p.

    Host syncs: none on an accelerator.
    """
    first = tensors[0]
    if first.is_cuda and first.dtype.is_floating_point and is_dense(first) and norm_type in (1, 2, math.inf):
        norms = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], norm_type, torch.float64)
        sums = torch.stack(norms)
        return sums.square_() if norm_type == 2 else sums
    if not (first.is_cpu and first.dtype.is_floating_point and is_dense(first) and norm_type == 2):
        return torch.stack([power_sum(tensor, norm_type) for tensor in tensors])
    # A handful of operators for each of thousands of small tensors would cost more than copying them together.
    sums = torch.empty(len(tensors), dtype=torch.float64)
    batch: list[int] = []
    elements = 0
    for i, tensor in enumerate(tensors):
        if tensor.numel() >= _ROW * 8:
            sums[i] = power_sum(tensor, norm_type)
            continue
        batch.append(i)
        elements += tensor.numel()
        if elements >= _CHUNK["cpu"]:
            sums[batch] = _sums_together([tensors[i] for i in batch])
            batch, elements = [], 0
    if batch:
        sums[batch] = _sums_together([tensors[i] for i in batch])
    return sums


def power_sum(grad: Tensor, norm_type: float) -> Tensor:
    """Σ|g|^p of one local tensor, 0-d float64; max|g| for p = inf, −min|g| for p = −inf.

    Args:
        grad: any floating or complex dtype, any shape, also empty, strided or sparse.
        norm_type: p.

    >>> power_sum(torch.tensor([300.0, 400.0], dtype=torch.float16), 2.0).sqrt()
    tensor(500., dtype=torch.float64)
    """
    values = _values(grad)
    if norm_type == 2 and values.device.type == "cpu" and values.numel() >= _ROW * 8 and _is_narrow(values.dtype):
        return _square_sum(values)
    powers = [_power(chunk, norm_type) for chunk in _chunks(values)]
    if len(powers) == 1:
        return powers[0]
    return combine(torch.stack(powers), norm_type) if powers else identity(norm_type, grad.device)


def row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor:
    """Σ|g|^p, or max|g|, of each row of one local tensor, (rows.count,) float64: see `kernels.row_powers`.

    >>> row_powers(torch.tensor([4.0, 0.0, 1.0]), Rows(0, 2, lead=1, width=2), 2.0)
    tensor([16.,  1.], dtype=torch.float64)
    """
    if grad.layout is not torch.strided:
        return _sparse_row_powers(grad, rows, norm_type)
    if grad.numel() == 0:
        return identity(norm_type, grad.device).repeat(rows.count)
    if rows.width:
        flat = grad.reshape(-1)
        grad = flat.new_zeros(rows.count * rows.width)
        grad[rows.lead : rows.lead + len(flat)] = flat
    matrix = grad.reshape(rows.count, -1)
    per = max(1, _CHUNK.get(grad.device.type, 1 << 24) // matrix.shape[1])
    return torch.cat([_row_power(piece, norm_type) for piece in torch.split(matrix, per)])


def row_index(grad: Tensor) -> Tensor:
    """Of what is stored of a sparse gradient, the row that each value is in.

    >>> row_index(torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse())
    tensor([0, 1])
    """
    if grad.is_sparse:
        return grad._indices()[0]
    lengths = grad.crow_indices().diff()
    return torch.arange(len(lengths), device=grad.device).repeat_interleave(lengths)


def combine(values: Tensor, norm_type: float) -> Tensor:
    """Of the power sums of several pieces, (n,), that of all of them."""
    return values.amax() if math.isinf(norm_type) else values.sum()


def identity(norm_type: float, device: torch.device) -> Tensor:
    """The power sum of nothing."""
    return torch.full((), -math.inf if norm_type == -math.inf else 0.0, dtype=accumulation_dtype(device), device=device)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, each of them once, in whatever order."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def _sums_together(tensors: Sequence[Tensor]) -> Tensor:
    """Σg² of each of some small dense tensors of a dtype, (n,) float64."""
    # Of one tensor this is a view: not to be squared in place.
    flat = torch._utils._flatten_dense_tensors(tensors).to(torch.float64)  # type: ignore[no-untyped-call]
    return torch.segment_reduce(flat * flat, "sum", lengths=torch.tensor([tensor.numel() for tensor in tensors]))


def _square_sum(grad: Tensor) -> Tensor:
    """Σg² of a large dense tensor on a CPU."""
    flat = _flat(grad)
    whole = flat[: flat.numel() // _ROW * _ROW]
    pieces = (piece.to(torch.float32).view(-1, _ROW) for piece in torch.split(whole, _ROW * _ROWS))
    norms = [torch.linalg.vector_norm(piece, dim=1) for piece in pieces]
    rest = flat[whole.numel() :].to(torch.float64)
    powers = torch.cat(norms).to(torch.float64).square_().sum() + torch.dot(rest, rest)
    if flat.numel() * _UNDERFLOW <= float(powers) < math.inf:
        return powers
    return torch.stack([torch.dot(chunk, chunk) for chunk in _chunks(grad)]).sum()


def _power(chunk: Tensor, norm_type: float) -> Tensor:
    """Σ|g|^p, or the extreme, of a piece that is not empty."""
    if norm_type == 2:
        return torch.dot(chunk, chunk)
    if norm_type == 0:
        return torch.count_nonzero(chunk).to(chunk.dtype)
    size = chunk.abs()
    if norm_type == math.inf:
        return size.amax()
    if norm_type == -math.inf:
        return -size.amin()
    return size.sum() if norm_type == 1 else size.pow_(norm_type).sum()


def _row_power(piece: Tensor, norm_type: float) -> Tensor:
    size = _widened(piece).abs()
    return size.amax(1) if math.isinf(norm_type) else size.pow_(norm_type).sum(1)


def _sparse_row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor:
    if grad.is_sparse:
        grad = grad.coalesce()
    index, values = row_index(grad), grad.values()
    powers = _row_power(values.reshape(len(index), -1), norm_type)
    extreme = "amax" if math.isinf(norm_type) else "sum"
    return torch.zeros(rows.count, dtype=powers.dtype, device=grad.device).scatter_reduce(0, index, powers, extreme)


def _values(grad: Tensor) -> Tensor:
    """What there is of a gradient, each element once."""
    if grad.is_sparse:
        return grad.coalesce().values()
    return grad if grad.layout is torch.strided else grad.values()


def _chunks(values: Tensor) -> Iterator[Tensor]:
    """The elements as 1-D float64 pieces (magnitudes where they are complex), never all of them at once."""
    for piece in torch.split(_flat(values), _CHUNK.get(values.device.type, 1 << 24)):
        if piece.numel():
            yield _widened(piece)


def _widened(piece: Tensor) -> Tensor:
    """In float64; the magnitude of a complex number, which may not fit into the dtype of its parts."""
    dtype = accumulation_dtype(piece.device)
    return piece.to(dtype.to_complex()).abs() if piece.is_complex() else piece.to(dtype)


def _flat(grad: Tensor) -> Tensor:
    """All elements in one dimension, in any order: a view wherever the memory is dense, also when permuted."""
    if not grad.is_contiguous() and is_dense(grad):
        return grad.as_strided((grad.numel(),), (1,))
    return grad.reshape(-1)
