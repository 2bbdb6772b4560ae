"""Compute power sums and checksums of many local tensors in one call, and scale the tensors, at memory bandwidth.

Three modules do the same work: `native` with one C call on a CPU, `triton_launch` with Triton kernels on a GPU, and
`torch_ops` with torch's operators on any tensor and for any p. The functions here pick the fastest that can do it.
`tensor_table` and `native_library` describe tensors to C, and `gpu_tables` describes them to a GPU.

The checksum of a tensor is the sum of its words modulo 2^32. A word is the 32 bits of a float32, either half of a
float64, or the 16 bits of a bfloat16 or float16 as a signed number. The checksum does not depend on the order of the
elements. So two tensors with equal elements have equal checksums, whatever their strides are. If a single bit differs,
the checksums differ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ...devices import accumulation_dtype, device_constant, runs_triton
from ...sharding.shard import Rows
from . import native, torch_ops
from .tensor_table import Powers, TensorTable

__all__ = ["Powers", "checksums", "fused_power_sums", "gpu_kernels", "power_sums", "powers_by_row", "scale_"]

_is_cpu = attrgetter("is_cpu")

_PLAIN = {Tensor, torch.nn.Parameter}

_FLOAT64_DTYPES = (torch.float64, torch.complex128)


def power_sums(
    tensors: Sequence[Tensor],
    norm_type: float,
    device: torch.device,
    description: TensorTable | None = None,
    with_checksums: bool = False,
) -> Powers:
    """Compute Σ|g|^p of each tensor, or max|g| for p = inf, or −min|g| for p = −inf.

    Args:
        tensors: of any floating or complex dtypes, layouts and devices.
        norm_type: p.
        device: where the result is needed.
        description: of the tensors, if they have been described already.
        with_checksums: whether to compute the checksums as well, in the same pass where possible.

    Returns:
        (n,) float64, whether any tensor is float64 or complex128, and the checksums.

    Host syncs: none on an accelerator.

    >>> power_sums([torch.tensor([3.0, 4.0]), torch.tensor([1.0])], 2.0, torch.device("cpu"))
    (tensor([25.,  1.], dtype=torch.float64), False, None)
    """
    # The usual case: all tensors are dense, real and on one device, and a single kernel takes them all.
    if tensors and (fused := fused_power_sums(tensors, norm_type, description, with_checksums)) is not None:
        words = fused[2]
        return fused[0].to(device), fused[1], None if words is None else words.to(device)
    has_float64 = any(tensor.dtype in _FLOAT64_DTYPES for tensor in tensors)
    sums = torch.empty(len(tensors), dtype=accumulation_dtype(device), device=device)
    words = torch.empty(len(tensors), dtype=torch.int64, device=device) if with_checksums else None
    # Otherwise there is one call for each kind of tensor, so that one odd tensor does not slow down the others.
    positions_by_kind = _positions_by_kind(tensors)
    for positions in positions_by_kind:
        group = [tensors[i] for i in positions]
        # With a single kind, the fused kernel has already refused exactly these tensors.
        fused = (
            fused_power_sums(group, norm_type, with_checksums=with_checksums) if len(positions_by_kind) > 1 else None
        )
        group_sums = torch_ops.power_sums(group, norm_type) if fused is None else fused[0]
        index = device_constant(tuple(positions), device, torch.int64)
        sums.index_copy_(0, index, group_sums.to(device))
        if words is not None:
            group_words = None if fused is None else fused[2]
            words.index_copy_(0, index, checksums(group, device) if group_words is None else group_words.to(device))
    return sums, has_float64, words


def checksums(
    tensors: Sequence[Tensor], device: torch.device, ranges: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Compute the sum of the words of each tensor, modulo 2^32.

    Args:
        tensors: of any dtypes, layouts and devices.
        device: where the result is needed.
        ranges: for each tensor, the elements to read, in the order of its memory. None for all.

    Returns:
        (n,) int64.

    Host syncs: none on an accelerator.

    >>> checksums([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])], torch.device("cpu"))
    tensor([2139095040, 2139095040])
    """
    if ranges is not None:
        if all(map(_is_cpu, tensors)) and (fused := native.checksums(tensors, ranges)) is not None:
            return fused.to(device)
        cut = (stop - start < tensor.numel() for tensor, (start, stop) in zip(tensors, ranges, strict=True))
        tensors = [
            torch_ops.flatten(tensor)[start:stop] if is_cut else tensor
            for tensor, (start, stop), is_cut in zip(tensors, ranges, cut, strict=True)
        ]
    words = torch.empty(len(tensors), dtype=torch.int64, device=device)
    positions_by_kind = _positions_by_kind(tensors)
    for positions in positions_by_kind:
        group = [tensors[i] for i in positions]
        kernels = gpu_kernels(group[0].device) or native
        fused = kernels.checksums(group)
        group_words = torch.stack([torch_ops.checksum(tensor) for tensor in group]) if fused is None else fused
        if len(positions_by_kind) == 1:
            return group_words.to(device)
        words.index_copy_(0, device_constant(tuple(positions), device, torch.int64), group_words.to(device))
    return words


def powers_by_row(
    grads: Sequence[Tensor],
    rows: Sequence[Rows],
    norm_type: float,
    device: torch.device,
    out: tuple[Tensor, Sequence[int]] | None = None,
) -> Tensor:
    """Compute Σ|g|^p, or max|g|, of each row of local tensors.

    Args:
        grads: of any floating or complex dtypes and devices, at least one. Dense, a slice of a flattened parameter, or
            sparse.
        rows: the rows that each tensor holds.
        norm_type: p > 0, or `inf`.
        device: where the result is needed.
        out: float64 vector on a CPU that is preferred for the result, see `native.powers_by_row`.

    Returns:
        The vector of `out`, or another one of (rows of all tensors,) float64, tensor after tensor.

    >>> powers_by_row([torch.tensor([[3.0, 4.0], [0.0, 1.0]])], [Rows(0, 2)], 2.0, torch.device("cpu"))
    tensor([25.,  1.], dtype=torch.float64)
    """
    # The usual case: one kernel takes all of them.
    if all(map(_is_cpu, grads)) and (powers := native.powers_by_row(grads, rows, norm_type, out)) is not None:
        return powers.to(device)
    results = []
    for grad, one in zip(grads, rows, strict=True):
        powers = native.powers_by_row([grad], [one], norm_type) if grad.is_cpu else None
        results.append(torch_ops.row_powers(grad, one, norm_type) if powers is None else powers)
    return torch.cat([powers.to(device) for powers in results])


def scale_(tensors: Sequence[Tensor], coefs: Tensor | float) -> bool:
    """Multiply tensors in place, without a host sync.

    Args:
        tensors: at least one.
        coefs: on a CPU, a number. On a GPU, (1,) or one per tensor, float64 on their device: the host need not know
            the values, and a factor of exactly 1 costs no memory traffic.

    Returns:
        Whether a kernel could scale the tensors. If not, no tensor has changed.

    Host syncs: none.
    """
    if not isinstance(coefs, Tensor):
        return native.scale_(tensors, coefs)
    kernels = gpu_kernels(tensors[0].device)
    return kernels is not None and bool(kernels.scale_(tensors, coefs))


def gpu_kernels(device: torch.device) -> Any:
    """Return the module `triton_launch` if the device can run it, None otherwise.

    Raises:
        ArgumentError: the installed Triton is too old.
    """
    if not runs_triton(device) or (kernels := _import_triton_launch()) is None:
        return None
    kernels.check_triton()
    return kernels


def fused_power_sums(
    tensors: Sequence[Tensor],
    norm_type: float,
    description: TensorTable | None = None,
    with_checksums: bool = False,
) -> Powers | None:
    """Compute `power_sums` with one kernel for all tensors.

    Args:
        tensors: at least one.
        norm_type: p.
        description: of the tensors, if they have been described already.
        with_checksums: whether to compute the checksums in the same pass.

    Returns:
        None if there is no kernel for these tensors or this p.
    """
    kernels = gpu_kernels(tensors[0].device) or native
    powers: Powers | None = kernels.power_sums(tensors, norm_type, description, with_checksums)
    return powers


def _positions_by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of tensors that one kernel can take together."""
    by_kind: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        # An operator for several tensors must not be given plain ones together with those of another class.
        kind = (tensor.device, tensor.dtype, torch_ops.is_dense(tensor), type(tensor) in _PLAIN)
        by_kind.setdefault(kind, []).append(i)
    return list(by_kind.values())


@functools.cache
def _import_triton_launch() -> Any:
    try:
        from . import triton_launch
    except ImportError:
        # Triton is optional. Without it, a GPU uses torch's operators.
        return None
    return triton_launch
