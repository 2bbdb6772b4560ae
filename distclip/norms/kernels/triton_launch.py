"""Launch Triton kernels over many GPU tensors at once: power sums, and scaling by a factor that is on the GPU.

A launch has one program for each chunk of 65,536 elements, whatever tensor the chunk belongs to. There are no host
syncs. Sums are reproducible: each chunk has one sum, and the sums of a tensor are added in order. They are float64, or
float32 on a device without float64, where pairs of float32 numbers keep the precision up to the last rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...devices import accumulation_dtype, current_device
from ...errors import ArgumentError
from . import triton_kernels
from .gpu_tables import CHUNK, GPUTable, get_table
from .tensor_table import CHECKSUMS_ONLY, OPERATIONS, Powers, TensorTable

__all__ = ["check_triton", "checksums", "power_sums", "scale_"]

# 256 threads, each of which takes eight elements of a block. Fusing is set explicitly because Triton's default differs
# between versions: a fused square is rounded once, with the sum.
_OPTIONS = {"num_warps": 4 if torch.version.hip else 8, "enable_fp_fusion": True}

OLDEST_TRITON = (3, 6)
"""Oldest version that can compile the kernels, which is that of the oldest supported torch."""


def check_triton() -> None:
    """Raise if the installed Triton is too old for the kernels.

    Raises:
        ArgumentError: see above.
    """
    version = triton_kernels.VERSION
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise ArgumentError(
            f"triton={version}: too old for the GPU kernels, which need {oldest}. Use the version that torch requires, "
            "or uninstall Triton, so that torch's operators are used."
        )


def power_sums(
    tensors: Sequence[Tensor], norm_type: float, description: TensorTable | None = None, with_checksums: bool = False
) -> Powers | None:
    """Compute Σ|g|^p, or max|g|, of each tensor.

    Args:
        tensors: on one device, at least one.
        norm_type: p.
        description: of the tensors, if they have been described already.
        with_checksums: whether to compute the checksums in the same pass.

    Returns:
        (n,) of `accumulation_dtype` on the tensors' device, whether any tensor is float64, and the checksums. None if p
        is not 1, 2 or inf, or `get_table` rejects the tensors.

    Host syncs: none. Launches: one for each dtype, and one more.
    """
    if norm_type not in OPERATIONS or (table := get_table(tensors, description)) is None:
        return None
    sums, words = _measure(table, len(tensors), tensors[0].device, OPERATIONS[norm_type], with_checksums)
    return sums, table.has_float64, words if with_checksums else None


def checksums(tensors: Sequence[Tensor]) -> Tensor | None:
    """Compute the checksum of each tensor, see `kernels.checksums`.

    Args:
        tensors: on one device, at least one.

    Returns:
        (n,) int64 on the tensors' device. None if `get_table` rejects the tensors.

    Host syncs: none. Launches: one for each dtype, and one more.
    """
    if (table := get_table(tensors)) is None:
        return None
    return _measure(table, len(tensors), tensors[0].device, CHECKSUMS_ONLY, True)[1]


def _measure(
    table: GPUTable, count: int, device: torch.device, operation: int, with_checksums: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(device)
    # A pair of float32 numbers for each chunk takes the space of one float64.
    partial = torch.empty(table.num_chunks * (8 // dtype.itemsize), dtype=dtype, device=device)
    sums = torch.empty(count, dtype=dtype, device=device)
    # Without checksums these stay empty, and no kernel touches them.
    partial_words = torch.empty(table.num_chunks if with_checksums else 0, dtype=torch.int64, device=device)
    words = torch.empty(count if with_checksums else 0, dtype=torch.int64, device=device)
    with current_device(device):
        for launch in table.launches:
            triton_kernels.powers[(len(launch.tensor),)](
                table.addresses, table.lengths, launch.tensor, launch.start, partial, partial_words, launch.first,
                operation, triton_kernels.ELEMENTS[launch.dtype], CHUNK, launch.aligned, with_checksums, **_OPTIONS,
            )  # fmt: skip
        triton_kernels.gather[(count,)](
            partial, partial_words, table.bounds, sums, words, operation, with_checksums, **_OPTIONS
        )
    return sums, words


def scale_(tensors: Sequence[Tensor], coefs: Tensor) -> bool:
    """Multiply tensors in place by factors on their device.

    Args:
        tensors: on one device, at least one.
        coefs: (1,), or one per tensor, of `accumulation_dtype`, on the tensors' device. A tensor whose factor is
            exactly 1 is neither read nor written. NaN multiplies.

    Returns:
        Whether the tensors were scaled. False if `get_table` rejects them.

    Host syncs: none. Launches: one for each dtype.
    """
    if (table := get_table(tensors)) is None:
        return False
    with current_device(coefs.device):
        for launch in table.launches:
            triton_kernels.scale[(len(launch.tensor),)](
                table.addresses, table.lengths, launch.tensor, launch.start, coefs, int(len(coefs) > 1),
                triton_kernels.ELEMENTS[launch.dtype], CHUNK, launch.aligned, **_OPTIONS,
            )  # fmt: skip
    # Autograd must see a write that bypasses torch's operators.
    torch.autograd.graph.increment_version(tensors)
    return True
