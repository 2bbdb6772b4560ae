"""Launch Triton kernels over many GPU tensors at once: power sums, and scaling by a factor that only the GPU knows.

A launch has one program for each chunk of 65,536 elements, whatever tensor the chunk belongs to. There are no host
syncs. Sums are float64 and reproducible: each chunk has one sum, and the sums of a tensor are added in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_kernels
from .gpu_tables import CHUNK, get_table
from .tensor_table import OPERATIONS, TensorTable

__all__ = ["power_sums", "scale_"]

# Fusing is set explicitly because Triton's default differs between versions. It loses nothing here: squares of float32
# are exact in float64.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def power_sums(
    tensors: Sequence[Tensor], norm_type: float, description: TensorTable | None = None
) -> tuple[Tensor, bool] | None:
    """Compute Σ|g|^p, or max|g|, of each tensor.

    Args:
        tensors: on one device, at least one.
        norm_type: p.
        description: of the tensors, if they have been described already.

    Returns:
        (n,) float64 on the tensors' device, and whether any tensor is float64. None if p is not 1, 2 or inf, or
        `get_table` rejects the tensors.

    Host syncs: none. Launches: one for each dtype, and one more.
    """
    if norm_type not in OPERATIONS or (table := get_table(tensors, description)) is None:
        return None
    operation, device = OPERATIONS[norm_type], tensors[0].device
    partial = torch.empty(table.num_chunks, dtype=torch.float64, device=device)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    with torch.cuda.device(sums.get_device()):
        for launch in table.launches:
            triton_kernels.powers[(len(launch.tensor),)](
                table.addresses, table.lengths, launch.tensor, launch.start, partial, launch.first,
                operation, triton_kernels.ELEMENTS[launch.dtype], CHUNK, launch.aligned, **_OPTIONS,
            )  # fmt: skip
        triton_kernels.gather[(len(tensors),)](partial, table.bounds, sums, operation, **_OPTIONS)
    return sums, table.has_float64


def scale_(tensors: Sequence[Tensor], coefs: Tensor) -> bool:
    """Multiply tensors in place by factors on their device.

    Args:
        tensors: on one device, at least one.
        coefs: (1,), or one per tensor. float64, on the tensors' device. A tensor whose factor is exactly 1 is neither
            read nor written. NaN multiplies.

    Returns:
        Whether the tensors were scaled. False if `get_table` rejects them.

    Host syncs: none. Launches: one for each dtype.
    """
    if (table := get_table(tensors)) is None:
        return False
    with torch.cuda.device(coefs.get_device()):
        for launch in table.launches:
            triton_kernels.scale[(len(launch.tensor),)](
                table.addresses, table.lengths, launch.tensor, launch.start, coefs, int(len(coefs) > 1),
                triton_kernels.ELEMENTS[launch.dtype], CHUNK, launch.aligned, **_OPTIONS,
            )  # fmt: skip
    # Autograd must see a write that bypasses torch's operators.
    torch.autograd.graph.increment_version(tensors)
    return True
