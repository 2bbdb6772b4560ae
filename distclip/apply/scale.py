"""Scale and clamp gradients in place: the only code that writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import device_constant, host_reads_free, on_one_thread, prefers_foreach
from ..norms.kernels import scale_ as scale_with_kernel_
from ..norms.kernels.torch_ops import row_index
from ..norms.limits import check_clampable, representable
from ..sharding.shard import Rows, Shard, Shards, coalesce_, stored_values

__all__ = ["clamp_", "scale_"]

_PLAIN = {Tensor, torch.nn.Parameter}

_HALF_PRECISION = (torch.float16, torch.bfloat16)


def scale_(shards: Shards, coefs: Tensor | float, foreach: bool | None = None) -> None:
    """Multiply every gradient by the coefficient of its slot in place.

    A partial gradient is scaled like its sum.

    Args:
        shards: this rank's shards.
        coefs: (slots,), or 0-d or a number for a single slot. On a CPU, a coefficient of exactly 1 writes nothing.
        foreach: whether to use torch's multi-tensor operators. None for the fastest way.

    Collectives: none. Host syncs: none (one if `coefs` is on another device than a gradient).
    """
    if isinstance(coefs, float):
        if coefs == 1:
            return
        coefs = torch.full((), coefs, dtype=torch.float64)
    elif coefs.numel() == 1 and host_reads_free(coefs.device) and coefs.item() == 1:
        return
    # Inference mode allows writes to tensors that were made under it, and to all others as well.
    with torch.inference_mode():
        _scale_by_slot(shards, coefs, foreach)


def _scale_by_slot(shards: Shards, coefs: Tensor, foreach: bool | None) -> None:
    """Multiply every gradient by the coefficient of its slot."""
    if coefs.numel() == 1:
        _scale_all(shards.grads, coefs.view(()), foreach)
    elif host_reads_free(coefs.device):
        # A policy per row can have more coefficients than there are gradients, so they are checked as one vector first.
        with on_one_thread(len(coefs), coefs.device):
            is_unclipped = bool((coefs == 1).all())
        if is_unclipped:
            return
        on_host = coefs.tolist()
        # The tensors of one slot, such as a group of parameters, are scaled together.
        by_slot: dict[int, list[Tensor]] = {}
        for i, info in enumerate(shards.infos):
            if info.rows is not None:
                _scale_rows(shards[i], info.rows, coefs, skip_ones=True)
            elif on_host[info.slot] != 1.0:
                by_slot.setdefault(info.slot, []).append(shards.grads[i])
        if foreach is None and _multiply_each(by_slot, on_host):
            return
        for slot, grads in by_slot.items():
            _scale_all(grads, coefs[slot], foreach if len(grads) > 1 else False)
    else:
        whole = shards.where([i for i, info in enumerate(shards.infos) if info.rows is None])
        factors = coefs[device_constant(whole.infos.slots, coefs.device, torch.int64)]
        if whole.grads and not scale_with_kernel_(whole.grads, factors):
            for grad, factor in zip(whole.grads, factors, strict=True):
                _scale_all([grad], factor, False)
        for shard in shards:
            if shard.rows is not None:
                _scale_rows(shard, shard.rows, coefs, skip_ones=False)


def _scale_all(grads: Sequence[Tensor], coef: Tensor, foreach: bool | None) -> None:
    """Multiply gradients by one coefficient."""
    if host_reads_free(coef.device) and float(coef) == 1.0:
        return
    for (device, dtype, is_plain), tensors in _by_kind(grads).items():
        together = foreach if is_plain else False
        if not host_reads_free(device):
            _scale_on_device(tensors, coef.to(device), together)
        elif together is not None or not scale_with_kernel_(tensors, float(coef)):
            # A Python number multiplies bfloat16 and float16 in float32, except in the multi-tensor operator.
            _multiply(tensors, float(coef), together is not False and dtype not in _HALF_PRECISION)


def _scale_on_device(tensors: list[Tensor], coef: Tensor, foreach: bool | None) -> None:
    """Multiply tensors by a factor that the host has not read."""
    if foreach is None and scale_with_kernel_(tensors, coef.view(1)):
        return
    if tensors[0].dtype in _HALF_PRECISION:
        for tensor in tensors:
            tensor.copy_(tensor.float() * coef)
    else:
        _multiply(tensors, coef.to(tensors[0].dtype), foreach is not False)


def _scale_rows(shard: Shard, rows: Rows, coefs: Tensor, *, skip_ones: bool) -> None:
    """Multiply every row of a gradient by the coefficient of its slot."""
    first = shard.slot + rows.first
    factors, grad = coefs[first : first + rows.count], shard.grad
    if skip_ones and bool((factors == 1).all()):
        return
    factors, values = factors.to(grad.device), stored_values(grad)
    if grad.layout is not torch.strided:
        factors = factors[row_index(grad)]
    elif rows.width:
        # A slice of a flattened parameter can begin and end anywhere in a row.
        factors = factors.repeat_interleave(rows.width)[rows.lead : rows.lead + values.numel()]
    compute_dtype = torch.promote_types(values.dtype, torch.float32)
    factors = factors.view(-1, *(1,) * (values.ndim - 1)).to(compute_dtype)
    if compute_dtype == values.dtype:
        values.mul_(factors)
    else:
        values.copy_(values.to(compute_dtype) * factors)


@torch.inference_mode()
def clamp_(shards: Shards, low: float, high: float, foreach: bool | None = None, *, magnitudes: bool = False) -> None:
    """Clamp every element of every gradient to [low, high] in place. NaN stays NaN.

    Args:
        shards: this rank's shards.
        low: lower limit.
        high: upper limit, ≥ low.
        foreach: whether to use torch's multi-tensor operators. None for the fastest way.
        magnitudes: clamp the magnitude of every element to [low, high] instead. Elements keep their signs, and 0 stays
            0.

    Raises:
        LayoutError: see `check_clampable`; before any gradient is written.

    Collectives: none. Host syncs: none.
    """
    for shard in shards:
        check_clampable(shard, low, high, magnitudes=magnitudes)
    coalesce_(shards.grads)
    for (device, dtype, is_plain), tensors in _by_kind(shards.grads).items():
        least, most = representable(low, dtype), representable(high, dtype)
        if magnitudes:
            for tensor in tensors:
                _clamp_magnitudes_(tensor, least, most)
            continue
        several = is_plain and (foreach or (foreach is None and prefers_foreach(device)))
        if several and not any(map(Tensor.is_neg, tensors)):
            torch._foreach_clamp_min_(tensors, least)
            torch._foreach_clamp_max_(tensors, most)
        else:
            for tensor in tensors:
                tensor.clamp_(least, most)


def _clamp_magnitudes_(tensor: Tensor, least: float, most: float) -> None:
    clamped = torch.copysign(tensor.abs().clamp_(least, most), tensor)
    # An element of 0 stays 0, so that parameters that were not used do not move.
    tensor.copy_(torch.where(tensor == 0, tensor, clamped))


def _by_kind(grads: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype, bool], list[Tensor]]:
    """Group the stored values of gradients by device, by dtype, and by whether they are plain tensors."""
    # Multi-tensor operators need one device and dtype. A tensor subclass of a library can apply them to the other
    # tensors of the list again, once for each tensor that it contains.
    groups: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for values in map(stored_values, grads):
        groups.setdefault((values.device, values.dtype, type(values) in _PLAIN), []).append(values)
    return groups


def _multiply_each(by_slot: dict[int, list[Tensor]], factors: Sequence[float]) -> bool:
    """Multiply the gradients of many slots in one call, and return whether this was possible."""
    grads = [grad for some in by_slot.values() for grad in some]
    kinds = {(type(grad), grad.dtype, grad.device, grad.layout) for grad in grads}
    if len(kinds) != 1 or any(map(Tensor.is_neg, grads)):
        return False
    kind, dtype, device, layout = next(iter(kinds))
    if kind not in _PLAIN or dtype in _HALF_PRECISION or layout is not torch.strided or not host_reads_free(device):
        return False
    torch._foreach_mul_(grads, [factors[slot] for slot, some in by_slot.items() for _ in some])
    return True


def _multiply(tensors: list[Tensor], factor: float | Tensor, foreach: bool) -> None:
    # The multi-tensor operators refuse a lazily negated tensor.
    if foreach and not any(map(Tensor.is_neg, tensors)):
        torch._foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)
