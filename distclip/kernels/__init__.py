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

_DOUBLES = (torch.float64, torch.complex128)


def power_sums(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> tuple[Tensor, bool]:
    """Σ|g|^p of each tensor, or max|g| for p = inf, −min|g| for p = −inf; and whether any of them is float64.

    Args:
        tensors: any floating or complex dtypes, layouts and devices.
        norm_type: p.
        device: where the result goes.

    Returns:
        (n,) float64; and whether some tensor is float64 or complex128.

    Host syncs: none on an accelerator.

    >>> power_sums([torch.tensor([3.0, 4.0]), torch.tensor([1.0])], 2.0, torch.device("cpu"))
    (tensor([25.,  1.], dtype=torch.float64), False)
    """
    if device.type == "cpu" and (found := native.power_sums(tensors, norm_type)) is not None:
        return found
    wide = any(tensor.dtype in _DOUBLES for tensor in tensors)
    sums = torch.empty(len(tensors), dtype=operators.wide(device), device=device)
    kinds: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype, operators.is_dense(tensor)), []).append(i)
    for chosen in kinds.values():
        alike = [tensors[i] for i in chosen]
        part = native.power_sums(alike, norm_type) if len(kinds) > 1 and alike[0].is_cpu else None
        part = part or (operators.power_sums(alike, norm_type), wide)
        sums[chosen if len(kinds) > 1 else slice(None)] = part[0].to(device)
    return sums, wide
