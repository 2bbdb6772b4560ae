"""Sums of powers of many local tensors at once, as fast as the memory allows.

Every module here does the same in another way: `operators` with torch's operators, on any tensor and for any p;
`native` by one C call, on a CPU. `power_sums` takes the fastest that can do it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, operators

__all__ = ["power_sums"]


def power_sums(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Σ|g|^p of each tensor, (n,) float64; max|g| for p = inf, −min|g| for p = −inf.

    Args:
        tensors: at least one; any floating or complex dtypes, layouts and devices.
        norm_type: p.
        device: where the result goes.

    Host syncs: none on an accelerator.

    >>> power_sums([torch.tensor([3.0, 4.0]), torch.tensor([1.0])], 2.0, torch.device("cpu"))
    tensor([25.,  1.], dtype=torch.float64)
    """
    if device.type == "cpu" and native.takes(tensors, norm_type):
        return native.power_sums(tensors, norm_type)
    kinds: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        strided = tensor.layout is torch.strided
        dense = strided and torch.ops.aten.is_non_overlapping_and_dense(tensor)
        kinds.setdefault((tensor.device, tensor.dtype, dense), []).append(i)
    if len(kinds) == 1:
        return operators.power_sums(tensors, norm_type, device)
    sums = torch.empty(len(tensors), dtype=operators.wide(device), device=device)
    for chosen in kinds.values():
        sums[chosen] = power_sums([tensors[i] for i in chosen], norm_type, device)
    return sums
