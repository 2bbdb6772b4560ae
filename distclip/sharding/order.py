"""Compare the order of parameters without names between the ranks that hold replicas of them.

Tensors without names count as one parameter if they have the same position. But two tensors of equal shape can be in
another order on another rank. Replicas have equal values, so another order can be detected: the ranks have the same
values at other positions. If the values themselves differ, the replicas have not been made equal yet, and nothing
follows about their order. The order of shards, and of parameters that are constant, such as zeros, cannot be checked.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..devices import is_fake
from .dtensor import local_of

__all__ = ["Order", "digest_values", "has_other_order", "order_of"]

Order: TypeAlias = tuple[int, int]
"""Hash of values in their order, and hash of the sorted values. (0, 0) if there are no values."""

_NUM_ELEMENTS = 64
"""Number of elements of each parameter that are read."""


def digest_values(tensors: Sequence[Tensor]) -> list[int] | None:
    """Return a checksum of some elements of each tensor, or None if the values cannot be read.

    Collectives: none. Host syncs: one on an accelerator.
    """
    locals_ = [local_of(tensor).detach() for tensor in tensors]
    if any(
        type(one) is not Tensor or one.is_meta or is_fake(one) or one.layout is not torch.strided for one in locals_
    ):
        return None
    # float32, because not every device has float64.
    samples = [one.reshape(-1)[:: max(1, one.numel() // _NUM_ELEMENTS)][:_NUM_ELEMENTS].float() for one in locals_]
    if len({one.device for one in samples}) != 1:
        return None
    content = array("f", torch.cat(samples).tolist()).tobytes()
    digests, begin = [], 0
    for one in samples:
        digests.append(zlib.crc32(content[begin : begin + 4 * one.numel()]))
        begin += 4 * one.numel()
    return digests


def order_of(digests: Sequence[int]) -> Order:
    """Return the hash of some checksums in their order, and the hash of the sorted ones.

    >>> order_of([1, 2])[1] == order_of([2, 1])[1], order_of([1, 2]) == order_of([2, 1])
    (True, False)
    """
    if not digests:
        return 0, 0
    return tuple(zlib.crc32(repr(some).encode()) for some in (list(digests), sorted(digests)))  # type: ignore[return-value]


def has_other_order(orders: Sequence[Order]) -> bool:
    """Return whether two of the orders have the same values in another order."""
    return len({any_order for _, any_order in orders}) < len(set(orders))
