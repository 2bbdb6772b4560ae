"""Compute power sums with torch's operators: for any tensor, any p and any device.

Sums are float64, whatever the dtype of the gradient. On a CPU, a large sum of squares is first computed in float32, in
rows that are short enough to lose nothing, and again in float64 if it overflows or underflows in float32.

On a device with few or no float64 units, elements are divided by a power of two close to the largest one, so that
nothing can overflow. Groups of them are added up in float32, and the groups in float64, or as pairs of float32 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...devices import accumulation_dtype, has_fast_float64, prefers_foreach
from ...sharding.shard import Rows

__all__ = [
    "checksum",
    "combine",
    "flatten",
    "identity",
    "is_dense",
    "power_sum",
    "power_sums",
    "row_index",
    "row_powers",
]

_CHUNK = {"cpu": 1 << 17}
"""Number of elements that are converted to float64 at a time. On a CPU they must fit into the cache."""

_ROW = 512
"""Number of elements that are summed in float32.

torch's row norm keeps at least eight sums of at most 64 additions each, which loses less than 1e-7. A dot product over
a million equal elements loses 1e-4.
"""

_ROWS = 1 << 11
"""Number of rows at a time: 4 MB."""

_LARGE = 1 << 20
"""Number of elements above which several float32 operators cost less than slow float64 units."""

_UNDERFLOW = 1.2e-31
"""Least average square for which a float32 sum is exact enough.

Squares below 1.2e-38, which underflow in float32, then contribute less than 1e-7 of the sum.
"""


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Compute Σ|g|^p of each tensor: see `power_sum`.

    Args:
        tensors: at least one. All have the same device and dtype, and all are dense or none is.
        norm_type: p.

    Returns:
        (n,) float64, on the tensors' device.

    Host syncs: none on an accelerator.
    """
    first = tensors[0]
    can_foreach = first.dtype.is_floating_point and is_dense(first) and norm_type in (1, 2, math.inf)
    if can_foreach and prefers_foreach(first.device) and accumulation_dtype(first.device) == torch.float64:
        return _foreach_power_sums(tensors, norm_type)
    in_batches = first.is_cpu and first.dtype.is_floating_point and is_dense(first) and norm_type == 2
    if not in_batches or accumulation_dtype(first.device) == torch.float32:
        return torch.stack([power_sum(tensor, norm_type) for tensor in tensors])
    # Copying thousands of small tensors together costs less than several operators for each.
    sums = torch.empty(len(tensors), dtype=torch.float64)
    batch: list[int] = []
    elements = 0
    for i, tensor in enumerate(tensors):
        # For a large tensor, the cost of several operators does not matter.
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
    """Compute Σ|g|^p of one local tensor, or max|g| for p = inf, or −min|g| for p = −inf.

    Args:
        grad: of any floating or complex dtype and any shape. It may be empty, strided or sparse.
        norm_type: p.

    Returns:
        0-d float64.

    >>> power_sum(torch.tensor([300.0, 400.0], dtype=torch.float16), 2.0).sqrt()
    tensor(500., dtype=torch.float64)
    """
    values = _values(grad)
    if _sums_in_float32(values, norm_type):
        return _power_in_float32(values, norm_type)
    # float64 has half the throughput on a CPU, so large sums of squares take the float32 path.
    if norm_type == 2 and values.device.type == "cpu" and values.numel() >= _ROW * 8 and _is_narrow(values.dtype):
        return _square_sum(values)
    powers = [_power(chunk, norm_type) for chunk in _chunks(values)]
    if len(powers) == 1:
        return powers[0]
    return combine(torch.stack(powers), norm_type) if powers else identity(norm_type, grad.device)


def checksum(tensor: Tensor) -> Tensor:
    """Compute the sum of the words of one tensor, modulo 2^32: see `kernels.checksums`.

    Args:
        tensor: of any dtype and any shape. It may be empty, strided or sparse. The words of a sparse tensor are those
            of its coalesced values.

    Returns:
        0-d int64.

    >>> int(checksum(torch.tensor([1.0])) - checksum(torch.tensor([-1.0]))) % 2**32 == 2**31
    True
    """
    values = flatten(_values(tensor).resolve_conj().resolve_neg())
    if values.is_complex():
        values = torch.view_as_real(values)
    # A view as integers needs elements that are next to each other, which those of a slice with a stride are not.
    values = values.contiguous().view(-1)
    words = values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))
    # A sum in int64 copies the words, so a large tensor is summed in pieces.
    pieces = torch.split(words, _CHUNK.get(words.device.type, 1 << 24))
    sums = [piece.to(torch.int64).sum() for piece in pieces]
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) & 0xFFFFFFFF


def row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor:
    """Compute Σ|g|^p, or max|g|, of each row of one local tensor: see `kernels.row_powers`.

    >>> row_powers(torch.tensor([4.0, 0.0, 1.0]), Rows(0, 2, lead=1, width=2), 2.0)
    tensor([16.,  1.], dtype=torch.float64)
    """
    if grad.layout is not torch.strided:
        return _sparse_row_powers(grad, rows, norm_type)
    if grad.numel() == 0:
        return identity(norm_type, grad.device).repeat(rows.count)
    if rows.width:
        # A slice of a flattened parameter: pad the first and the last row with zeros, which add nothing.
        flat = grad.reshape(-1)
        grad = flat.new_zeros(rows.count * rows.width)
        grad[rows.lead : rows.lead + len(flat)] = flat
    matrix = grad.reshape(rows.count, -1)
    rows_at_a_time = max(1, _CHUNK.get(grad.device.type, 1 << 24) // matrix.shape[1])
    return torch.cat([_row_power(piece, norm_type) for piece in torch.split(matrix, rows_at_a_time)])


def row_index(grad: Tensor) -> Tensor:
    """Return the row of each stored value of a sparse gradient.

    >>> row_index(torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse())
    tensor([0, 1])
    """
    if grad.is_sparse:
        return grad._indices()[0]
    lengths = grad.crow_indices().diff()
    return torch.arange(len(lengths), device=grad.device).repeat_interleave(lengths)


def combine(values: Tensor, norm_type: float) -> Tensor:
    """Combine the power sums of several pieces, (n,), into one."""
    # math.isinf is avoided, because torch.compile cannot trace it for a number that changes between calls.
    return values.amax() if norm_type in (math.inf, -math.inf) else values.sum()


def identity(norm_type: float, device: torch.device) -> Tensor:
    """Return the power sum of no elements, the identity of `combine`."""
    return torch.full((), -math.inf if norm_type == -math.inf else 0.0, dtype=accumulation_dtype(device), device=device)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a range of memory, each exactly once, in any order."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def _sums_together(tensors: Sequence[Tensor]) -> Tensor:
    """Compute Σg² of each of several small dense tensors of one dtype."""
    # For a single tensor, `flat` is a view of the gradient, so it must not be squared in place.
    flat = torch._utils._flatten_dense_tensors(tensors).to(torch.float64)  # type: ignore[no-untyped-call]
    return torch.segment_reduce(flat * flat, "sum", lengths=torch.tensor([tensor.numel() for tensor in tensors]))


def _square_sum(grad: Tensor) -> Tensor:
    """Compute Σg² of a large dense tensor on a CPU."""
    flat = flatten(grad)
    whole = flat[: flat.numel() // _ROW * _ROW]
    pieces = (piece.to(torch.float32).view(-1, _ROW) for piece in torch.split(whole, _ROW * _ROWS))
    norms = [torch.linalg.vector_norm(piece, dim=1) for piece in pieces]
    tail = flat[whole.numel() :].to(torch.float64)
    powers = torch.cat(norms).to(torch.float64).square_().sum() + torch.dot(tail, tail)
    # The host reads a number on a CPU without a sync. The second pass is rare.
    if flat.numel() * _UNDERFLOW <= float(powers) < math.inf:
        return powers
    return torch.stack([torch.dot(chunk, chunk) for chunk in _chunks(grad)]).sum()


def _power(chunk: Tensor, norm_type: float) -> Tensor:
    """Compute Σ|g|^p, max|g| or −min|g| of a float64 piece that is not empty."""
    if norm_type == 2:
        return torch.dot(chunk, chunk)
    if norm_type == 0:
        return torch.count_nonzero(chunk).to(chunk.dtype)
    size = chunk.abs()
    if norm_type == math.inf:
        return size.amax()
    if norm_type == -math.inf:
        # Negated, so that the pieces of this norm are combined with a maximum too.
        return -size.amin()
    return size.sum() if norm_type == 1 else size.pow_(norm_type).sum()


def _row_power(piece: Tensor, norm_type: float) -> Tensor:
    if _sums_in_float32(piece, norm_type):
        return _row_powers_in_float32(piece, norm_type)
    size = _to_float64(piece).abs()
    return size.amax(1) if math.isinf(norm_type) else size.pow_(norm_type).sum(1)


def _foreach_power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Compute Σ|g|^p of each dense tensor on a device that prefers multi-tensor operators."""
    # One operator measures all tensors, except large ones where float64 is slow, which take the float32 path.
    slow = [i for i, tensor in enumerate(tensors) if tensor.numel() >= _LARGE and _sums_in_float32(tensor, norm_type)]
    small = [tensor[:0] if i in slow else tensor for i, tensor in enumerate(tensors)] if slow else tensors
    norms = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in small], norm_type, torch.float64)
    sums = torch.stack(norms)
    if norm_type == 2:
        sums.square_()
    for i in slow:
        sums[i] = _power_in_float32(tensors[i], norm_type)
    return sums


def _sums_in_float32(values: Tensor, norm_type: float) -> bool:
    """Return whether to compute Σ|g|^p in float32."""
    is_slow = not has_fast_float64(values.device) or accumulation_dtype(values.device) == torch.float32
    return (
        is_slow
        and 0 < norm_type < math.inf
        and values.numel() > 0
        and (values.dtype == torch.complex64 or _is_narrow(values.dtype))
    )


def _power_in_float32(values: Tensor, norm_type: float) -> Tensor:
    """Compute Σ|g|^p of a tensor with few float64 operations, or none.

    It takes two of them for 32 elements, and none on a device without float64.
    """
    return _row_powers_in_float32(flatten(values).view(1, -1), norm_type)[0]


def _row_powers_in_float32(matrix: Tensor, norm_type: float) -> Tensor:
    """Compute Σ|g|^p of each row like `_power_in_float32`. A row has at least one element."""
    parts = torch.split(matrix, 1 << 24, dim=1)
    sizes = [part.abs().to(torch.float32) if part.is_complex() else part.to(torch.float32) for part in parts]
    # Infinity and NaN stay in the quotients.
    peaks = torch.stack([torch.linalg.vector_norm(size, math.inf, dim=1) for size in sizes]).amax(0)
    powers_of_two = (peaks.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(2.0**-126, 2.0**126)
    quotients = (size / powers_of_two.view(-1, 1) for size in sizes)
    groups = torch.cat([_sum_groups(quotient.abs_().pow_(norm_type)) for quotient in quotients], dim=1)
    if accumulation_dtype(matrix.device) == torch.float64:
        return groups.sum(1, dtype=torch.float64) * powers_of_two.to(torch.float64) ** norm_type
    half = powers_of_two ** (norm_type / 2)
    return _sum_as_pairs(groups) * half * half


def _sum_groups(terms: Tensor) -> Tensor:
    """Add up groups of 32 numbers of each row.

    This takes two steps, so that no number takes part in more than ten roundings.
    """
    return _fold(_fold(terms, 4).sum(2), 8).sum(2)


def _sum_as_pairs(high: Tensor) -> Tensor:
    """Add up float32 numbers ≥ 0 of each row as pairs of float32 numbers, and round the sums.

    A large number is added to each number and subtracted again. This keeps the high bits, which are multiples of one
    common unit, and few enough that their sum is exact in any order. What is left over is at most 2^-11 of the sum.

    Source: Rump, Ogita, Oishi, "Accurate floating-point summation part I: faithful rounding", SIAM J. Sci. Comput. 31
    (2008), section 3.
    """
    whole, low = high.sum(1), torch.zeros_like(high)
    while high.shape[1] > 1:
        pieces, rest = _fold(high, _PAIRS), _fold(low, _PAIRS)
        large = pieces.amax(2, keepdim=True) * (3 * _PAIRS)
        first = (pieces + large) - large
        total, lost = first.sum(2), ((pieces - first) + rest).sum(2)
        high = total + lost
        low = lost - (high - total)
    # A pair with an infinity becomes NaN, because infinity minus infinity is NaN.
    return torch.where(whole.isfinite(), high[:, 0], whole)


_PAIRS = 2048
"""Number of pairs that are added up at a time. A sum of so many 12-bit multiples of one unit fits into 24 bits."""


def _fold(matrix: Tensor, length: int) -> Tensor:
    """Reshape (rows, n) to (rows, pieces, length). Zeros fill the last piece."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % length)).view(len(matrix), -1, length)


def _sparse_row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor:
    # Duplicate indices must be added before the powers are taken.
    if grad.is_sparse:
        grad = grad.coalesce()
    index, values = row_index(grad), grad.values()
    powers = _row_power(values.reshape(len(index), -1), norm_type)
    reduction = "amax" if math.isinf(norm_type) else "sum"
    return torch.zeros(rows.count, dtype=powers.dtype, device=grad.device).scatter_reduce(0, index, powers, reduction)


def _values(grad: Tensor) -> Tensor:
    """Return the stored elements of a gradient, each once."""
    if grad.is_sparse:
        return grad.coalesce().values()
    return grad if grad.layout is torch.strided else grad.values()


def _chunks(values: Tensor) -> Iterator[Tensor]:
    """Yield the elements as 1-D float64 pieces, which are magnitudes if the gradient is complex."""
    for piece in torch.split(flatten(values), _CHUNK.get(values.device.type, 1 << 24)):
        if piece.numel():
            yield _to_float64(piece)


def _to_float64(piece: Tensor) -> Tensor:
    """Convert to float64. Complex numbers become magnitudes, which may overflow the dtype of their parts."""
    dtype = accumulation_dtype(piece.device)
    return piece.to(dtype.to_complex()).abs() if piece.is_complex() else piece.to(dtype)


def flatten(grad: Tensor) -> Tensor:
    """Flatten in any order. The result is a view if the memory is dense, even if dims are permuted."""
    if not grad.is_contiguous() and is_dense(grad):
        return grad.as_strided((grad.numel(),), (1,))
    return grad.reshape(-1)
