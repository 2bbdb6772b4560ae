"""Triton kernels over many tensors of a GPU in one launch: sums of powers, and a factor that only the device knows.

A launch has one program for every chunk of 65,536 elements, of whichever tensor. The host waits for nothing. Sums are
float64, and of the same bits every time: a chunk has one sum, and those of a tensor are added up in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_kernels
from .gpu_tables import CHUNK, table_of
from .tensor_table import OPERATIONS

__all__ = ["power_sums", "scale_"]

# Said rather than left to a default that moves: squares of float32 are exact in float64, so that fusing loses nothing.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> tuple[Tensor, bool] | None:
    """Σ|g|^p of each tensor, or its max|g|, (n,) float64 on their device; and whether any of them is float64.

    Args:
        tensors: of one device, at least one.
        norm_type: p.

    Returns:
        None where it cannot be done: p is not 1, 2 or inf, or see `table_of`.

    Host syncs: none. Launches: one for every dtype, and one more.
    """
    if norm_type not in OPERATIONS or (table := table_of(tensors)) is None:
        return None
    operation, device = OPERATIONS[norm_type], tensors[0].device
    partial = torch.empty(table.chunks, dtype=torch.float64, device=device)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    with torch.cuda.device(sums.get_device()):
        for part in table.parts:
            triton_kernels.powers[(len(part.tensor),)](
                table.addresses, table.lengths, part.tensor, part.start, partial, part.first,
                operation, triton_kernels.ELEMENTS[part.dtype], CHUNK, part.aligned, **_OPTIONS,
            )  # fmt: skip
        triton_kernels.gather[(len(tensors),)](partial, table.bounds, sums, operation, **_OPTIONS)
    return sums, table.wide


def scale_(tensors: Sequence[Tensor], coefs: Tensor) -> bool:
    """Multiply tensors in place by factors on their device; one whose factor is exactly 1 is neither read nor written.

    Args:
        tensors: of one device, at least one.
        coefs: (1,), or one for each tensor; float64, on their device. NaN multiplies.

    Returns:
        Whether it could be done: see `table_of`.

    Host syncs: none. Launches: one for every dtype.
    """
    if (table := table_of(tensors)) is None:
        return False
    with torch.cuda.device(coefs.get_device()):
        for part in table.parts:
            triton_kernels.scale[(len(part.tensor),)](
                table.addresses, table.lengths, part.tensor, part.start, coefs, int(len(coefs) > 1),
                triton_kernels.ELEMENTS[part.dtype], CHUNK, part.aligned, **_OPTIONS,
            )  # fmt: skip
    torch.autograd.graph.increment_version(tensors)
    return True
