"""The last norms of every slot, and quantiles of them.

A history is a ring, (slots, window), beside a count per slot of all norms that ever entered: slots may start late and
miss steps. Nothing is written in place, nothing waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..devices import accumulation_dtype

__all__ = ["append", "numbers", "quantile"]


def numbers(*shape: int, device: torch.device, fill: float = 0.0) -> Tensor:
    """State in the dtype of the norms."""
    return torch.full(shape, fill, dtype=accumulation_dtype(device), device=device)


def append(history: Tensor, count: Tensor, values: Tensor) -> Tensor:
    """The history with one more value per slot, in the place of the oldest once it is full.

    Args:
        history: (slots, window).
        count: (slots,), how many values entered before.
        values: (slots,).

    >>> append(torch.tensor([[1.0, 2.0]]), torch.tensor([2]), torch.tensor([3.0]))
    tensor([[3., 2.]])
    """
    return history.scatter(1, (count % history.shape[1]).unsqueeze(1), values.unsqueeze(1))


def quantile(history: Tensor, count: Tensor, q: float) -> Tensor:
    """The q-quantile of what is in each slot's history, linear between neighbours as numpy's; NaN of an empty one.

    torch.quantile takes neither a count nor more than 16 M elements.

    Args:
        history: (slots, window).
        count: (slots,), how many values entered so far.
        q: in [0, 1].

    >>> quantile(torch.tensor([[4.0, 2.0, 0.0], [9.0, 5.0, 1.0]]), torch.tensor([2, 8]), 0.75)
    tensor([3.5000, 7.0000])
    """
    window = history.shape[1]
    filled = count.clamp(max=window).unsqueeze(1)
    missing = torch.arange(window, device=count.device) >= filled
    ordered = history.masked_fill(missing, math.inf).sort(dim=1).values
    last = (filled - 1).clamp(min=0)
    rank = q * last.to(history.dtype)
    below = rank.long()
    above = torch.minimum(below + 1, last)
    return ordered.gather(1, below).lerp(ordered.gather(1, above), rank - below).squeeze(1)
