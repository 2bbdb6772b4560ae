"""Verdict → gradients: the only place that writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..devices import device_constant
from ..errors import LayoutError
from ..norms.kernels import scale_ as scale_many_
from ..norms.kernels.torch_ops import row_index
from ..sharding.shard import Rows, Shard, Shards, stored_values

__all__ = ["clamp_", "outside", "scale_"]

_NARROW = (torch.float16, torch.bfloat16)


def scale_(shards: Iterable[Shard], coefs: Tensor, foreach: bool | None = None) -> None:
    """Multiply every gradient by the coefficient of its slot in place; a summand of the true one is scaled alike.

    On CPU a coefficient of exactly 1 writes nothing.

    Args:
        shards: of this rank.
        coefs: (slots,), or 0-d for one.
        foreach: use torch's multi-tensor operators, or do not; None for what is fastest.

    Collectives: none. Host syncs: none (one if `coefs` lies on another device than a gradient).
    """
    shards = Shards.of(shards)
    if coefs.numel() == 1:
        _scale_alike(shards.grads, coefs.view(()), foreach)
        return
    if coefs.device.type == "cpu":
        on_host = coefs.tolist()
        for shard in shards:
            if shard.rows is not None:
                _scale_rows(shard, shard.rows, coefs, known=True)
            elif on_host[shard.slot] != 1.0:
                _scale_alike([shard.grad], coefs[shard.slot], False)
        return
    whole = shards.where([i for i, place in enumerate(shards.places) if place.rows is None])
    factors = coefs[device_constant(whole.places.slots, coefs.device, torch.int64)]
    if whole.grads and not scale_many_(whole.grads, factors):
        for grad, factor in zip(whole.grads, factors, strict=True):
            _scale_alike([grad], factor, False)
    for shard in shards:
        if shard.rows is not None:
            _scale_rows(shard, shard.rows, coefs, known=False)


def _scale_alike(grads: Sequence[Tensor], coef: Tensor, foreach: bool | None) -> None:
    if coef.device.type == "cpu" and float(coef) == 1.0:
        return
    for (device, dtype), tensors in _by_place(grads).items():
        if device.type != "cpu":
            _scale_on_device(tensors, coef.to(device), foreach)
        elif foreach is not None or not scale_many_(tensors, float(coef)):
            # As a number it multiplies in float32 also what is stored in bfloat16 or float16, save by the multi-tensor
            # operator.
            _multiply(tensors, float(coef), foreach is not False and dtype not in _NARROW)


def _scale_on_device(tensors: list[Tensor], coef: Tensor, foreach: bool | None) -> None:
    """Multiply by a factor that the host does not know."""
    if foreach is None and scale_many_(tensors, coef.view(1)):
        return
    if tensors[0].dtype in _NARROW:
        for tensor in tensors:
            tensor.copy_(tensor.float() * coef)
    else:
        _multiply(tensors, coef.to(tensors[0].dtype), foreach is not False)


def _scale_rows(shard: Shard, rows: Rows, coefs: Tensor, known: bool) -> None:
    first = shard.slot + rows.first
    factors, grad = coefs[first : first + rows.count], shard.grad
    if known and bool((factors == 1).all()):
        return
    factors, values = factors.to(grad.device), stored_values(grad)
    if grad.layout is not torch.strided:
        factors = factors[row_index(grad)]
    elif rows.width:
        factors = factors.repeat_interleave(rows.width)[rows.lead : rows.lead + values.numel()]
    wide = torch.promote_types(values.dtype, torch.float32)
    factors = factors.view(-1, *(1,) * (values.ndim - 1)).to(wide)
    if wide == values.dtype:
        values.mul_(factors)
    else:
        values.copy_(values.to(wide) * factors)


def clamp_(shards: Iterable[Shard], low: float, high: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient to [low, high] in place. NaN stays NaN.

    Args:
        shards: of this rank.
        low: lower bound.
        high: upper bound, ≥ low.
        foreach: use torch's multi-tensor operators; None lets the device decide.

    Raises:
        LayoutError: a gradient that is complex, holds summands, or is sparse with bounds that exclude 0; nothing is
            written then.

    Collectives: none. Host syncs: none.
    """
    shards = Shards.of(shards)
    for shard in shards:
        _check_clampable(shard, low, high)
    for (device, dtype), tensors in _by_place(shards.grads).items():
        least, most = _representable(low, dtype), _representable(high, dtype)
        if foreach or (foreach is None and device.type == "cuda"):
            torch._foreach_clamp_min_(tensors, least)
            torch._foreach_clamp_max_(tensors, most)
        else:
            for tensor in tensors:
                tensor.clamp_(least, most)


def outside(shard: Shard, low: float, high: float) -> Tensor:
    """Whether some element of a gradient lies outside of [low, high], 0-d bool on its device.

    Raises:
        LayoutError: see `clamp_`.
    """
    _check_clampable(shard, low, high)
    values = stored_values(shard.grad)
    least, most = _representable(low, values.dtype), _representable(high, values.dtype)
    return (values < least).any() | (values > most).any()


def _check_clampable(shard: Shard, low: float, high: float) -> None:
    """Refuse gradients whose elements cannot be clamped one by one.

    Raises:
        LayoutError: complex, unreduced summands, or a sparse gradient whose missing zeros lie outside of the bounds.
    """
    why = (
        "is complex, and complex numbers have no order: clip its norm"
        if shard.grad.is_complex()
        else "holds summands of the gradient (Partial): redistribute it to Replicate() or Shard(dim) first"
        if shard.pending
        else f"is sparse, and its zeros lie outside of [{low}, {high}]: use bounds around 0 or a dense gradient"
        if shard.grad.layout is not torch.strided and not low <= 0 <= high
        else None
    )
    if why is not None:
        raise LayoutError(f"clip_value: the gradient of {shard.name} {why}.")


def _by_place(grads: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """What is stored of the gradients, grouped as the multi-tensor operators want it."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for values in map(stored_values, grads):
        groups.setdefault((values.device, values.dtype), []).append(values)
    return groups


def _representable(bound: float, dtype: torch.dtype) -> float:
    """The bound, or ±inf where the dtype reaches less far: nothing finite lies beyond it."""
    return bound if abs(bound) <= torch.finfo(dtype).max else math.copysign(math.inf, bound)


def _multiply(tensors: list[Tensor], factor: float | Tensor, foreach: bool) -> None:
    if foreach:
        torch._foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)
