"""Compare the elements of a gradient with limits, and refuse gradients whose elements cannot be clamped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import LayoutError
from ..sharding.shard import Shard, element_values

__all__ = ["any_out_of_limits", "check_clampable", "representable"]


def any_out_of_limits(shard: Shard, low: float, high: float, *, magnitudes: bool = False) -> Tensor:
    """Return whether some element of a gradient is outside of [low, high], 0-d bool on its device.

    Args:
        shard: of this rank.
        low: lower limit.
        high: upper limit, ≥ low.
        magnitudes: whether the limits are those of magnitudes, except zeros.

    Raises:
        LayoutError: see `check_clampable`.

    Host syncs: none.
    """
    check_clampable(shard, low, high, magnitudes=magnitudes)
    values = element_values(shard.grad)
    least, most = representable(low, values.dtype), representable(high, values.dtype)
    if magnitudes:
        sizes = values.abs()
        return ((sizes < least) & (values != 0)).any() | (sizes > most).any()
    return (values < least).any() | (values > most).any()


def check_clampable(shard: Shard, low: float, high: float, *, magnitudes: bool = False) -> None:
    """Raise if the elements of a gradient cannot be clamped to [low, high] one by one.

    Args:
        shard: of this rank.
        low: lower limit.
        high: upper limit, ≥ low.
        magnitudes: whether the limits are those of magnitudes, except zeros.

    Raises:
        LayoutError: the gradient is complex, partial, or sparse while 0 is outside of the limits.
    """
    if shard.grad.is_complex():
        reason = "is complex, and complex numbers have no order. Clip its norm instead"
    elif shard.partial_sums:
        reason = "is partial. Redistribute it to Replicate() or Shard(dim) first"
    elif shard.grad.layout is not torch.strided and not magnitudes and not low <= 0 <= high:
        reason = f"is sparse, and its zeros are outside of [{low}, {high}]. Use limits around 0 or a dense gradient"
    else:
        return
    raise LayoutError(f"clip_value: the gradient of {shard.name} {reason}.")


def representable(limit: float, dtype: torch.dtype) -> float:
    """Return the limit, or ±inf if it exceeds the range of the dtype.

    >>> representable(1e6, torch.float16)
    inf
    """
    return limit if abs(limit) <= torch.finfo(dtype).max else math.copysign(math.inf, limit)
