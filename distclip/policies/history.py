"""Keep the last norms of every slot, and compute quantiles of them.

A history is a ring buffer, (slots, window), with a count per slot of all values that were ever appended, because slots
can start late and miss steps. No function writes in place or waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..devices import accumulation_dtype

__all__ = ["append", "is_filled", "quantile", "zeros"]


def zeros(*shape: int, device: torch.device) -> Tensor:
    """Return zeros in the dtype of the norms."""
    return torch.zeros(shape, dtype=accumulation_dtype(device), device=device)


def append(history: Tensor, count: Tensor, values: Tensor) -> Tensor:
    """Return the history with one more value per slot, which overwrites the oldest one of a full history.

    Args:
        history: (slots, window).
        count: (slots,), the number of values appended before.
        values: (slots,).

    >>> append(torch.tensor([[1.0, 2.0]]), torch.tensor([2]), torch.tensor([3.0]))
    tensor([[3., 2.]])
    """
    return history.scatter(1, (count % history.shape[1]).unsqueeze(1), values.unsqueeze(1))


def is_filled(history: Tensor, count: Tensor) -> Tensor:
    """Return a mask of the entries that hold a value.

    Args:
        history: (slots, window).
        count: (slots,), the number of values appended so far.

    >>> is_filled(torch.zeros(2, 3), torch.tensor([1, 7]))
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    return torch.arange(history.shape[1], device=count.device) < count.unsqueeze(1)


def quantile(history: Tensor, count: Tensor, q: float) -> Tensor:
    """Return the q-quantile of each slot's history, interpolated linearly like numpy's.

    torch.quantile takes neither a count nor more than 16 M elements.

    Args:
        history: (slots, window).
        count: (slots,), the number of values appended so far.
        q: in [0, 1].

    Returns:
        (slots,), NaN for an empty history.

    >>> quantile(torch.tensor([[4.0, 2.0, 0.0], [9.0, 5.0, 1.0]]), torch.tensor([2, 8]), 0.75)
    tensor([3.5000, 7.0000])
    """
    filled = count.clamp(max=history.shape[1]).unsqueeze(1)
    # Empty entries are sorted to the end, so that the values begin at index 0.
    ordered = history.masked_fill(~is_filled(history, count), math.inf).sort(dim=1).values
    last = (filled - 1).clamp(min=0)
    rank = q * last.to(history.dtype)
    below = rank.long()
    above = torch.minimum(below + 1, last)
    return ordered.gather(1, below).lerp(ordered.gather(1, above), rank - below).squeeze(1)
