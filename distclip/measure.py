"""Shard → Partials: what this rank adds to the total, in float64, whatever the gradient's own dtype.

Squares of float16, bfloat16 and float32 numbers are exact in float64 and cannot overflow there, so that a norm is
neither rounded to the gradient's dtype nor lost at 300 (float16) or 1e25 (float32), and a non-finite sum of powers
means a non-finite element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import Shard

__all__ = ["Partials", "measure", "power_sum"]

_CHUNK = {"cpu": 1 << 15}
"""Elements widened at a time, so that the temporary does not grow with the model; on a CPU it stays in the cache."""


@dataclass(frozen=True, slots=True)
class Partials:
    """What one rank adds to the total.

    Args:
        value: 0-d float64 on the gradients' device: Σ|g|^p / copies, or max|g| for p = inf (−min|g| for −inf).
        outside: 0-d bool, whether some element lies outside of the policy's bounds.
        pending: whether some gradient has to be summed over ranks before it can be measured; it is not in `value`.
        wide: whether some gradient is float64 or complex128.
    """

    value: Tensor
    outside: Tensor
    pending: bool = False
    wide: bool = False


def measure(
    shards: Iterable[Shard],
    norm_type: float,
    device: torch.device,
    inspect: Callable[[Shard], Tensor] | None = None,
) -> Partials:
    r"""Sum this rank's powers, :math:`\sum_s \frac{1}{copies_s} \sum_i |g_{s,i}|^p`, or take the extreme.

    Args:
        shards: of this rank; those that wait for a sum are only counted.
        norm_type: p.
        device: where the result goes.
        inspect: says of a shard whether it has elements outside of the policy's bounds, 0-d bool.

    Returns:
        `Partials`. Nothing at all gives the neutral element.

    Raises:
        Whatever `inspect` raises.

    Collectives: none. Host syncs: none on the gradients' own device.
    """
    extreme = math.isinf(norm_type)
    values: list[Tensor] = []
    outside = torch.zeros((), dtype=torch.bool, device=device)
    pending = wide = False
    for shard in shards:
        wide = wide or shard.grad.dtype in (torch.float64, torch.complex128)
        if inspect is not None:
            outside |= inspect(shard).to(device)
        if shard.pending:
            pending = True
            continue
        value = power_sum(shard.grad, norm_type).to(device)
        values.append(value if extreme or shard.copies == 1 else value / shard.copies)
    if not values:
        return Partials(_neutral(norm_type, device), outside, pending, wide)
    return Partials(_together(values, norm_type), outside, pending, wide)


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
    wide = _wide(grad.device)
    for piece in torch.split(_flat(grad), _CHUNK.get(grad.device.type, 1 << 24)):
        if piece.numel():
            # The magnitude of a complex number may not fit into the dtype of its parts.
            yield piece.to(wide.to_complex()).abs() if piece.is_complex() else piece.to(wide)


def _flat(grad: Tensor) -> Tensor:
    """All elements in one dimension, in any order: a view wherever the memory is dense, also when permuted."""
    if not grad.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(grad):
        return grad.as_strided((grad.numel(),), (1,))
    return grad.reshape(-1)


def _neutral(norm_type: float, device: torch.device) -> Tensor:
    start = -math.inf if norm_type == -math.inf else 0.0
    return torch.tensor(start, dtype=_wide(device), device=device)


def _wide(device: torch.device) -> torch.dtype:
    """float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
