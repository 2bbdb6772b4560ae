"""The C kernel: sums of powers of all of a CPU's tensors in one call, on all of its cores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .description import describe
from .library import library

__all__ = ["power_sums"]

_OPERATIONS = {2.0: 0, 1.0: 1, math.inf: 2}


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> tuple[Tensor, bool] | None:
    """Σ|g|^p of each tensor, or its max|g|, (n,) float64; and whether any of them is float64.

    Args:
        tensors: any number.
        norm_type: p.

    Returns:
        None where it cannot be done: the library is not there, p is not 1, 2 or inf, or see `describe`.

    The bits depend on the elements and their order alone, not on threads, alignment or neighbours; bfloat16 squares are
    added up in float32 by 2,048, everything else in float64.

    >>> found = power_sums([torch.tensor([300.0, 400.0], dtype=torch.float16), torch.zeros(0)], 2.0)
    >>> found if library() else (torch.tensor([250000.0, 0.0], dtype=torch.float64), False)
    (tensor([250000.,      0.], dtype=torch.float64), False)
    """
    c = library()
    if c is None or norm_type not in _OPERATIONS or (found := describe(tensors, "cpu")) is None:
        return None
    sums = torch.empty(len(tensors), dtype=torch.float64)
    operation, threads = _OPERATIONS[norm_type], torch.get_num_threads()
    if c.power_sums(operation, len(tensors), *found.pointers(), sums.data_ptr(), threads):
        raise MemoryError(f"no memory for the table of {len(tensors)} tensors")
    return sums, found.wide
