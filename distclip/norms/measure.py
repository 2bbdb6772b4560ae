"""Shard → Partials: what this rank adds to the total, in float64, whatever the gradient's own dtype.

Squares of float16, bfloat16 and float32 numbers are exact in float64 and cannot overflow there, so that a norm is
neither rounded to the gradient's dtype nor lost at 300 (float16) or 1e25 (float32), and a non-finite sum of powers
means a non-finite element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import device_constant
from ..sharding.shard import Rows, Shard, ShardInfos, Shards
from .kernels import power_sums, row_powers
from .kernels.torch_ops import identity

__all__ = ["Evidence", "Partials", "joined", "measure"]

Evidence = tuple[tuple[str, ...], Tensor]
"""Names of parameters, and what was measured of each of them: (names,) power sums, or a row of them."""


@dataclass(frozen=True, slots=True)
class Partials:
    """What one rank adds to the total.

    Args:
        value: (slots,) float64 on the gradients' device: Σ|g|^p / copies, or max|g| for p = inf (−min|g| for −inf).
        outside: 0-d bool, whether some element lies outside of the policy's bounds; None where there are none.
        pending: whether some gradient has to be summed over ranks before it can be measured; it is not in `value`.
        wide: whether some gradient is float64 or complex128.
        weight: (slots,), the same of the parameters, or None.
        each: what each measured shard has alone: evidence of which one is not finite.
    """

    value: Tensor
    outside: Tensor | None = None
    pending: bool = False
    wide: bool = False
    weight: Tensor | None = None
    each: tuple[Evidence, ...] = ()


def measure(
    shards: Iterable[Shard],
    norm_type: float,
    device: torch.device,
    inspect: Callable[[Shard], Tensor] | None = None,
    slots: int = 1,
    weights: Iterable[Shard] | None = None,
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
    shards = Shards.of(shards)
    outside = None
    if inspect is not None:
        outside = torch.zeros((), dtype=torch.bool, device=device)
        for shard in shards:
            outside |= inspect(shard).to(device)
    value, pending, is_wide, each = _by_slot(shards, norm_type, device, slots)
    weight = None if weights is None else _by_slot(Shards.of(weights), norm_type, device, slots)[0]
    return Partials(value, outside, pending, is_wide, weight, each)


def _by_slot(
    shards: Shards, norm_type: float, device: torch.device, slots: int
) -> tuple[Tensor, bool, bool, tuple[Evidence, ...]]:
    """What all shards have together by slot, whether some had to be left out, whether any is float64, and what each has
    alone."""
    if slots == 1 and shards.merged is not None and device.type == "cpu":
        shards = shards.merged
    places, chosen, apart = shards.places.whole
    others = [shards[i] for i in apart]
    whole = Shards(places, [shards.grads[i] for i in chosen]) if apart else shards
    by_row = [shard for shard in others if not shard.pending]
    is_wide = any(shard.grad.dtype in (torch.float64, torch.complex128) for shard in others)
    each: list[Evidence] = []
    if whole.grads:
        sums, some_wide = power_sums(whole.grads, norm_type, device)
        is_wide = is_wide or some_wide
        each.append((whole.places.names, sums))
        total = joined(_shared(sums, whole.places.num_replicas, norm_type), whole.places, norm_type, slots)
    else:
        total = identity(norm_type, device).repeat(slots)
    for shard in by_row:
        assert isinstance(shard.rows, Rows)
        powers = row_powers(shard.grad, shard.rows, norm_type).to(device)
        each.append(((shard.name,), powers.view(1, -1)))
        first = shard.slot + shard.rows.first
        part = total[first : first + shard.rows.count]
        own = powers if math.isinf(norm_type) or shard.num_replicas == 1 else powers / shard.num_replicas
        part.copy_(torch.maximum(part, own) if math.isinf(norm_type) else part + own)
    return total, len(by_row) < len(others), is_wide, tuple(each)


def _shared(sums: Tensor, num_replicas: Sequence[float], norm_type: float) -> Tensor:
    """This rank's part of power sums that several ranks have; all of an extreme."""
    if math.isinf(norm_type) or not num_replicas:
        return sums
    return sums / device_constant(tuple(num_replicas), sums.device, sums.dtype)


def joined(sums: Tensor, places: ShardInfos, norm_type: float, slots: int) -> Tensor:
    """(slots,): power sums of one slot added up, always in the same order, so that copies have the same bits."""
    if slots == 1:
        return sums.amax(0, keepdim=True) if math.isinf(norm_type) else sums.sum(0, keepdim=True)
    if math.isinf(norm_type):
        index = device_constant(places.slots, sums.device, torch.int64)
        return identity(norm_type, sums.device).repeat(slots).scatter_reduce_(0, index, sums, "amax")
    order, lengths = places.by_slot(slots)
    sums = sums[device_constant(order, sums.device, torch.int64)]
    return torch.segment_reduce(sums, "sum", lengths=device_constant(lengths, sums.device, torch.int64))
