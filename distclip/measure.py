"""Shard → Partials: what this rank adds to the total, in float64, whatever the gradient's own dtype.

Squares of float16, bfloat16 and float32 numbers are exact in float64 and cannot overflow there, so that a norm is
neither rounded to the gradient's dtype nor lost at 300 (float16) or 1e25 (float32), and a non-finite sum of powers
means a non-finite element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import Rows, Shard

__all__ = ["Partials", "constant", "measure", "power_sum", "row_index", "row_powers", "wide"]

_CHUNK = {"cpu": 1 << 15}
"""Elements widened at a time, so that the temporary does not grow with the model; on a CPU it stays in the cache."""


@dataclass(frozen=True, slots=True)
class Partials:
    """What one rank adds to the total.

    Args:
        value: (slots,) float64 on the gradients' device: Σ|g|^p / copies, or max|g| for p = inf (−min|g| for −inf).
        outside: 0-d bool, whether some element lies outside of the policy's bounds.
        pending: whether some gradient has to be summed over ranks before it can be measured; it is not in `value`.
        wide: whether some gradient is float64 or complex128.
        weight: (slots,), the same of the parameters, or None.
        each: what each measured shard has alone, in their order: evidence of which one is not finite.
    """

    value: Tensor
    outside: Tensor
    pending: bool = False
    wide: bool = False
    weight: Tensor | None = None
    each: tuple[tuple[str, Tensor], ...] = ()


def measure(
    shards: Iterable[Shard],
    norm_type: float,
    device: torch.device,
    inspect: Callable[[Shard], Tensor] | None = None,
    slots: int = 1,
    weights: Sequence[Shard] | None = None,
) -> Partials:
    r"""Sum this rank's powers, :math:`\sum_s \frac{1}{copies_s} \sum_i |g_{s,i}|^p`, or take the extreme, by slot.

    Args:
        shards: of this rank; those that wait for a sum are only counted.
        norm_type: p.
        device: where the result goes.
        inspect: says of a shard whether it has elements outside of the policy's bounds, 0-d bool.
        slots: how many norms there are; shards say in which one they count.
        weights: this rank's pieces of the parameters, to be measured as well.

    Returns:
        `Partials`. Nothing at all gives the neutral element.

    Raises:
        Whatever `inspect` raises.

    Collectives: none. Host syncs: none on the gradients' own device.
    """
    each: list[tuple[Shard, Tensor]] = []
    outside = torch.zeros((), dtype=torch.bool, device=device)
    pending = is_wide = False
    for shard in shards:
        is_wide = is_wide or shard.grad.dtype in (torch.float64, torch.complex128)
        if inspect is not None:
            outside |= inspect(shard).to(device)
        if shard.pending:
            pending = True
        else:
            each.append((shard, _own(shard, norm_type, device)))
    value = _by_slot(each, norm_type, device, slots)
    weight = None
    if weights is not None:
        weight = _by_slot([(w, _own(w, norm_type, device)) for w in weights], norm_type, device, slots)
    return Partials(value, outside, pending, is_wide, weight, tuple((shard.name, own) for shard, own in each))


def power_sum(grad: Tensor, norm_type: float) -> Tensor:
    """Σ|g|^p of one local tensor, 0-d float64; max|g| for p = inf, −min|g| for p = −inf.

    Args:
        grad: any floating or complex dtype, any shape, also empty, strided or sparse.
        norm_type: p.

    >>> power_sum(torch.tensor([300.0, 400.0], dtype=torch.float16), 2.0).sqrt()
    tensor(500., dtype=torch.float64)
    """
    powers = [_power(chunk, norm_type) for chunk in _chunks(grad)]
    if len(powers) == 1:
        return powers[0]
    return _together(powers, norm_type) if powers else _neutral(norm_type, grad.device)


def row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor:
    """Σ|g|^p, or max|g|, of each row of one local tensor, (rows.count,) float64.

    Args:
        grad: any floating or complex dtype; dense, a slice of a flattened parameter, or sparse.
        rows: which rows these are.
        norm_type: p > 0, or `inf`.

    >>> row_powers(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), Rows(0, 2), 2.0)
    tensor([25.,  1.], dtype=torch.float64)
    >>> row_powers(torch.tensor([4.0, 0.0, 1.0]), Rows(0, 2, lead=1, width=2), 2.0)
    tensor([16.,  1.], dtype=torch.float64)
    """
    if grad.layout is not torch.strided:
        return _sparse_row_powers(grad, rows, norm_type)
    if grad.numel() == 0:
        return _neutral(norm_type, grad.device).repeat(rows.count)
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


def _own(shard: Shard, norm_type: float, device: torch.device) -> Tensor:
    """What a shard adds to its slot (0-d), or to the slots of its rows (1-D)."""
    if shard.rows is None:
        value = power_sum(shard.grad, norm_type).to(device)
    else:
        value = row_powers(shard.grad, shard.rows, norm_type).to(device)
    return value if math.isinf(norm_type) or shard.copies == 1 else value / shard.copies


def _by_slot(each: list[tuple[Shard, Tensor]], norm_type: float, device: torch.device, slots: int) -> Tensor:
    """Put together what counts in the same slot: always in the same order, so that copies have the same bits."""
    if slots == 1:
        values = [value.view(()) for _, value in each if value.numel()]
        return (_together(values, norm_type) if values else _neutral(norm_type, device)).view(1)
    total = _neutral(norm_type, device).repeat(slots)
    whole: dict[int, list[Tensor]] = {}
    for shard, value in each:
        if shard.rows is None:
            whole.setdefault(shard.slot, []).append(value)
        elif shard.rows.count:
            first = shard.slot + shard.rows.first
            part = total[first : first + shard.rows.count]
            part.copy_(torch.maximum(part, value) if math.isinf(norm_type) else part + value)
    if whole:
        values = [_together(v, norm_type) if len(v) > 1 else v[0] for v in whole.values()]
        total.index_copy_(0, constant(tuple(whole), device), torch.stack(values))
    return total


@functools.lru_cache(maxsize=64)
def constant(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers that are the same at every step: they travel to the device once. Not to be written to."""
    return torch.tensor(numbers, dtype=dtype, device=device)


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


def _together(values: list[Tensor], norm_type: float) -> Tensor:
    """Of several pieces what `_power` is of one."""
    stacked = torch.stack(values)
    return stacked.amax() if math.isinf(norm_type) else stacked.sum()


def _chunks(grad: Tensor) -> Iterator[Tensor]:
    """The elements as 1-D float64 pieces (magnitudes where they are complex), never all of them at once."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    elif grad.layout is not torch.strided:
        grad = grad.values()
    for piece in torch.split(_flat(grad), _CHUNK.get(grad.device.type, 1 << 24)):
        if piece.numel():
            yield _widened(piece)


def _widened(piece: Tensor) -> Tensor:
    """In float64; the magnitude of a complex number, which may not fit into the dtype of its parts."""
    dtype = wide(piece.device)
    return piece.to(dtype.to_complex()).abs() if piece.is_complex() else piece.to(dtype)


def _flat(grad: Tensor) -> Tensor:
    """All elements in one dimension, in any order: a view wherever the memory is dense, also when permuted."""
    if not grad.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(grad):
        return grad.as_strided((grad.numel(),), (1,))
    return grad.reshape(-1)


def _neutral(norm_type: float, device: torch.device) -> Tensor:
    start = -math.inf if norm_type == -math.inf else 0.0
    return torch.tensor(start, dtype=wide(device), device=device)


def wide(device: torch.device) -> torch.dtype:
    """What numbers are added up and kept in: float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
