"""Call the C kernels, which sum the powers of all CPU tensors, or scale the tensors, in one call on all cores."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...sharding.shard import Rows
from .native_library import load_library
from .tensor_table import CHECKSUMS_ONLY, DTYPES, OPERATIONS, Powers, TensorTable, describe_tensors

__all__ = ["checksums", "power_sums", "powers_by_row", "row_powers", "scale_"]


def power_sums(
    tensors: Sequence[Tensor], norm_type: float, table: TensorTable | None = None, with_checksums: bool = False
) -> Powers | None:
    """Compute Σ|g|^p, or max|g|, of each tensor.

    The bits depend on the elements and their order alone, not on threads, alignment or neighbours in memory. Squares of
    bfloat16 are summed in float32 in runs of 2,048 elements, everything else in float64.

    Args:
        tensors: any number.
        norm_type: p.
        table: description of the tensors, if they have been described already.
        with_checksums: whether to compute the checksums in the same pass.

    Returns:
        (n,) float64, whether any tensor is float64, and the checksums. None if there is no library, p is not 1, 2 or
        inf, or `describe_tensors` rejects a tensor.

    >>> sums = power_sums([torch.tensor([300.0, 400.0], dtype=torch.float16), torch.zeros(0)], 2.0)
    >>> sums[:2] if sums else (torch.tensor([250000.0, 0.0], dtype=torch.float64), False)
    (tensor([250000.,      0.], dtype=torch.float64), False)
    """
    if norm_type not in OPERATIONS or load_library() is None:
        return None
    if (table := table or describe_tensors(tensors, "cpu")) is None:
        return None
    sums, words = _measure(table, OPERATIONS[norm_type], with_checksums)
    return sums, table.has_float64, words


def checksums(tensors: Sequence[Tensor], ranges: Sequence[tuple[int, int]] | None = None) -> Tensor | None:
    """Compute the checksum of each tensor, see `kernels.checksums`.

    Args:
        tensors: any number.
        ranges: for each tensor, the elements to read, in the order of its memory. None for all.

    Returns:
        (n,) int64. None if there is no library, or `describe_tensors` rejects a tensor.
    """
    if load_library() is None or (table := describe_tensors(tensors, "cpu")) is None:
        return None
    # Addresses are changed here because slices of tensors would take several operators each.
    for i, (start, stop) in enumerate(ranges or ()):
        table.addresses[i] += start * tensors[i].element_size()
        table.lengths[i] = stop - start
    return _measure(table, CHECKSUMS_ONLY, True)[1]


def row_powers(grad: Tensor, rows: Rows, norm_type: float) -> Tensor | None:
    """Compute Σ|g|^p, or max|g|, of each row of one tensor: see `powers_by_row`."""
    return powers_by_row([grad], [rows], norm_type)


def powers_by_row(
    grads: Sequence[Tensor],
    rows: Sequence[Rows],
    norm_type: float,
    out: tuple[Tensor, Sequence[int]] | None = None,
) -> Tensor | None:
    """Compute Σ|g|^p, or max|g|, of each row of each tensor.

    Args:
        grads: contiguous.
        rows: the rows that each tensor holds. With `width`, the tensor is a slice of a flattened parameter.
        norm_type: p.
        out: float64 vector to write to, and the index in it of the first row of each tensor. The other rows of the
            tensor follow. None for a new vector, with tensor after tensor.

    Returns:
        The vector. None, without a write, if the C kernel cannot do it: see `power_sums`.

    >>> powers = powers_by_row([torch.tensor([4.0, 0.0, 1.0])], [Rows(0, 2, lead=1, width=2)], 2.0)
    >>> powers if load_library() else torch.tensor([16.0, 1.0], dtype=torch.float64)
    tensor([16.,  1.], dtype=torch.float64)
    """
    library = load_library()
    if norm_type not in OPERATIONS or library is None or (table := describe_tensors(grads, "cpu")) is None:
        return None
    # Rows of a dense tensor that is not contiguous are not ranges of memory.
    if not all(map(Tensor.is_contiguous, grads)):
        return None
    widths = (one.width or length // max(1, one.count) for one, length in zip(rows, table.lengths, strict=True))
    counts = array("q", [one.count for one in rows])
    columns = [counts, array("q", [one.lead for one in rows]), array("q", widths)]
    if out is None:
        firsts: Iterable[int] = itertools.accumulate(counts, initial=0)
        sums = torch.empty(sum(counts), dtype=torch.float64)
    else:
        sums, firsts = out
    columns.append(array("q", firsts))
    addresses = (*table.pointers(), *(column.buffer_info()[0] for column in columns), sums.data_ptr())
    operation, threads = OPERATIONS[norm_type], torch.get_num_threads()
    if library.measure_rows(operation, len(grads), *addresses, threads, library.openmp):
        raise MemoryError(f"no memory for the table of {len(sums)} rows")
    return sums


def scale_(tensors: Sequence[Tensor], factor: float) -> bool:
    """Multiply tensors in place. bfloat16 is multiplied in float32.

    Args:
        tensors: any number.
        factor: any number. NaN multiplies too.

    Returns:
        Whether the tensors were scaled. False if there is no library, a tensor is float16, or `describe_tensors`
        rejects one.

    >>> tensors = [torch.tensor([2.0, 4.0])]
    >>> scale_(tensors, 0.5) or torch._foreach_mul_(tensors, 0.5) is None
    True
    >>> tensors
    [tensor([1., 2.])]
    """
    library = load_library()
    if library is None or (table := describe_tensors(tensors, "cpu")) is None:
        return False
    if DTYPES.index(torch.float16) in table.dtypes:
        return False
    # The kernel starts with the last tensors, which the measurement has just read: they may still be in a cache.
    if library.scale(factor, len(tensors), *table.pointers(), torch.get_num_threads(), library.openmp):
        return False
    # Autograd must see a write that bypasses torch's operators.
    torch.autograd.graph.increment_version(tensors)
    return True


def _measure(table: TensorTable, operation: int, with_checksums: bool) -> tuple[Tensor, Tensor | None]:
    library, count = load_library(), len(table.addresses)
    assert library is not None
    sums = torch.empty(count, dtype=torch.float64)
    words = torch.empty(count, dtype=torch.int64) if with_checksums else None
    outputs = sums.data_ptr(), None if words is None else words.data_ptr()
    if library.measure(operation, count, *table.pointers(), *outputs, torch.get_num_threads(), library.openmp):
        raise MemoryError(f"no memory for the table of {count} tensors")
    return sums, words
