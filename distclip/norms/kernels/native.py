"""The C kernels: sums of powers of all of a CPU's tensors, or their multiplication, in one call on all of its cores."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ...sharding.shard import Rows
from .native_library import library
from .tensor_table import DTYPES, OPERATIONS, Description, describe

__all__ = ["power_sums", "row_powers", "scale_"]


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
    if norm_type not in OPERATIONS or library() is None or (found := describe(tensors, "cpu")) is None:
        return None
    return _summed(found, norm_type), found.wide


def row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor | None:
    """Σ|g|^p, or max|g|, of each row of one tensor, (rows.count,) float64: every row is a tensor of its own.

    Args:
        grad: contiguous; with `rows.width`, a slice of a flattened parameter.
        rows: which rows these are.
        norm_type: p.

    Returns:
        None where it cannot be done: see `power_sums`.

    >>> found = row_powers(torch.tensor([4.0, 0.0, 1.0]), Rows(0, 2, lead=1, width=2), 2.0)
    >>> found if library() else torch.tensor([16.0, 1.0], dtype=torch.float64)
    tensor([16.,  1.], dtype=torch.float64)
    """
    if norm_type not in OPERATIONS or library() is None or grad.layout is not torch.strided:
        return None
    if grad.numel() == 0:
        return torch.zeros(rows.count, dtype=torch.float64)
    if not grad.is_contiguous() or (whole := describe([grad], "cpu")) is None:
        return None
    count, size, base = rows.count, grad.element_size(), whole.addresses[0]
    width = rows.width or grad.numel() // count
    first = base - rows.lead * size
    each = Description(0)
    each.addresses = array("q", range(first, first + count * width * size, width * size))
    each.lengths, each.dtypes = array("q", [width]) * count, array("i", whole.dtypes * count)
    # The first and the last row may lie partly on other ranks.
    each.addresses[0], each.lengths[0] = base, width - rows.lead
    each.lengths[-1] = grad.numel() - (each.addresses[-1] - base) // size
    return _summed(each, norm_type)


def scale_(tensors: Sequence[Tensor], factor: float) -> bool:
    """Multiply tensors in place, bfloat16 in float32; the last ones first, which may still be in the cache.

    Args:
        tensors: any number.
        factor: NaN multiplies.

    Returns:
        Whether it could be done: the library is there, no tensor is float16, see `describe`.

    >>> tensors = [torch.tensor([2.0, 4.0])]
    >>> scale_(tensors, 0.5) or torch._foreach_mul_(tensors, 0.5) is None
    True
    >>> tensors
    [tensor([1., 2.])]
    """
    c = library()
    if c is None or (found := describe(tensors, "cpu")) is None or DTYPES.index(torch.float16) in found.dtypes:
        return False
    if c.scale(factor, len(tensors), *found.pointers(), torch.get_num_threads(), c.openmp):
        return False
    torch.autograd.graph.increment_version(tensors)
    return True


def _summed(found: Description, norm_type: float) -> Tensor:
    c, count = library(), len(found.addresses)
    assert c is not None
    sums = torch.empty(count, dtype=torch.float64)
    operation, threads = OPERATIONS[norm_type], torch.get_num_threads()
    if c.power_sums(operation, count, *found.pointers(), sums.data_ptr(), threads, c.openmp):
        raise MemoryError(f"no memory for the table of {count} tensors")
    return sums
