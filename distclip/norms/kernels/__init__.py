"""Sums of powers of many local tensors at once, and their multiplication, as fast as the memory allows.

Every module does the same in another way: `operators` with torch's operators, on any tensor and for any p; `native` by
one C call, on a CPU; `multi_tensor` by Triton kernels, on a GPU. Here the fastest that can do it is taken. `library`
and `description` tell C where tensors lie, `table` tells the GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...devices import accumulation_dtype, device_constant
from ...sharding.shard import Rows
from . import native, torch_ops

__all__ = ["at_once", "power_sums", "row_powers", "scale_"]

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
    if tensors and (found := at_once(tensors, norm_type)) is not None:
        return found[0].to(device), found[1]
    wide = any(tensor.dtype in _DOUBLES for tensor in tensors)
    sums = torch.empty(len(tensors), dtype=accumulation_dtype(device), device=device)
    kinds: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype, torch_ops.is_dense(tensor)), []).append(i)
    for chosen in kinds.values():
        alike = [tensors[i] for i in chosen]
        found = at_once(alike, norm_type) if len(kinds) > 1 else None
        part = torch_ops.power_sums(alike, norm_type) if found is None else found[0]
        sums.index_copy_(0, device_constant(tuple(chosen), device, torch.int64), part.to(device))
    return sums, wide


def row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor:
    """Σ|g|^p, or max|g|, of each row of one local tensor, (rows.count,) float64 on its device.

    Args:
        grad: any floating or complex dtype; dense, a slice of a flattened parameter, or sparse.
        rows: which rows these are.
        norm_type: p > 0, or `inf`.

    >>> row_powers(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), Rows(0, 2), 2.0)
    tensor([25.,  1.], dtype=torch.float64)
    """
    found = native.row_powers(grad, rows, norm_type) if grad.is_cpu else None
    return torch_ops.row_powers(grad, rows, norm_type) if found is None else found


def scale_(tensors: Sequence[Tensor], coefs: Tensor | float) -> bool:
    """Multiply tensors in place: on a CPU by a number, on a GPU by what the host does not know, where 1 costs nothing.

    Args:
        tensors: at least one.
        coefs: a number; or (1,), or one for each tensor, float64 on their device.

    Returns:
        Whether it could be done.

    Host syncs: none.
    """
    if not isinstance(coefs, Tensor):
        return native.scale_(tensors, coefs)
    kernels = on_gpu(tensors[0].device)
    return kernels is not None and bool(kernels.scale_(tensors, coefs))


def on_gpu(device: torch.device) -> Any:
    """The Triton kernels, if the device can run them."""
    return _triton() if device.type == "cuda" else None


def at_once(tensors: Sequence[Tensor], norm_type: float) -> tuple[Tensor, bool] | None:
    """`power_sums` by a kernel that takes all of them; None where there is none.

    Args:
        tensors: at least one.
        norm_type: p.
    """
    kernels = on_gpu(tensors[0].device) or native
    found: tuple[Tensor, bool] | None = kernels.power_sums(tensors, norm_type)
    return found


@functools.cache
def _triton() -> Any:
    try:
        return importlib.import_module(".triton_launch", __name__)
    except ImportError:
        return None
