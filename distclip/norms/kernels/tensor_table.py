"""Describe tensors in memory with tables that C and GPU kernels can read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor

from .native_library import load_library
from .torch_ops import is_dense

__all__ = ["CHECKSUMS_ONLY", "DTYPES", "KERNEL_DEVICES", "OPERATIONS", "Powers", "TensorTable", "describe_tensors"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels support. A kernel refers to a dtype by its index here."""

OPERATIONS = {2.0: 0, 1.0: 1, math.inf: 2}
"""Index of the kernels' operation for each supported p."""

CHECKSUMS_ONLY = 3
"""Index of the operation that computes no power sums."""

Powers: TypeAlias = tuple[Tensor, bool, Tensor | None]
"""Power sums of n tensors, (n,) float64, whether any tensor is float64, and their checksums, (n,) int64, or None."""

_INDEX_OF_DTYPE = {dtype: i for i, dtype in enumerate(DTYPES)}

_device_of, _layout_of, _is_nested = attrgetter("device"), attrgetter("layout"), attrgetter("is_nested")

_PLAIN_TYPES = {Tensor, torch.nn.Parameter}

# Tensors of AMD's GPUs are "cuda" for torch, but not for DLPack.
_DLPACK_DEVICE_TYPES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "xpu": 14}

KERNEL_DEVICES = frozenset(_DLPACK_DEVICE_TYPES)
"""Types of devices whose tensors can be described."""

_UNKNOWN_API = 2
"""Return value of the C function `distclip_describe` if torch has a newer DLPack API than native.c knows."""


class TensorTable:
    """Addresses, lengths (elements) and dtypes (indices into `DTYPES`) of tensors.

    Args:
        count: number of tensors.
    """

    def __init__(self, count: int) -> None:
        # Arrays of C integers: a kernel reads them in place.
        self.addresses, self.lengths = array("q", bytes(8 * count)), array("q", bytes(8 * count))
        self.dtypes = array("i", bytes(4 * count))

    @property
    def has_float64(self) -> bool:
        """True if any tensor is float64."""
        return 0 in self.dtypes

    def pointers(self) -> tuple[int, int, int]:
        """Return the addresses of the three arrays."""
        return self.addresses.buffer_info()[0], self.lengths.buffer_info()[0], self.dtypes.buffer_info()[0]


def describe_tensors(tensors: Sequence[Tensor], device: str) -> TensorTable | None:
    """Describe tensors that are all plain, dense, real and on one kind of device.

    Args:
        tensors: any number.
        device: "cpu", "cuda" or "xpu".

    Returns:
        None unless all are plain dense tensors. Subclasses are rejected: they may have no storage.

    >>> table = describe_tensors([torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)], "cpu")
    >>> list(table.lengths), list(table.dtypes)
    ([6, 4], [1, 2])
    """
    # The exact type is compared, because an instance of a subclass is a Tensor too.
    if not _PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    table, library = TensorTable(len(tensors)), load_library()
    if library is None or library.dlpack is None:
        return table if _fill(table, tensors, device) else None
    listed = tensors if type(tensors) is list else list(tensors)
    arguments = (library.dlpack, len(listed), listed, library.list_item, _DLPACK_DEVICE_TYPES[device])
    try:
        status = library.describe(*arguments, *table.pointers())
    except (BufferError, RuntimeError):
        # DLPack raises for a tensor that it cannot express, such as a sparse one.
        return None
    # Without the API, later calls read the attributes of each tensor right away.
    if status == _UNKNOWN_API:
        library.dlpack = None
        return describe_tensors(tensors, device)
    return None if status else table


def _fill(table: TensorTable, tensors: Sequence[Tensor], device: str) -> bool:
    """Fill a table without DLPack. Return whether the kernels support all tensors."""
    # One pass per column at the speed of C, because a model has thousands of tensors.
    dtypes = list(map(attrgetter("dtype"), tensors))
    if not _INDEX_OF_DTYPE.keys() >= set(dtypes) or any(one.type != device for one in set(map(_device_of, tensors))):
        return False
    if not (set(map(_layout_of, tensors)) <= {torch.strided} and not any(map(_is_nested, tensors))):
        return False
    if not all(map(Tensor.is_contiguous, tensors)) and not all(map(is_dense, tensors)):
        return False
    table.addresses, table.lengths = array("q", map(Tensor.data_ptr, tensors)), array("q", map(Tensor.numel, tensors))
    table.dtypes = array("i", map(_INDEX_OF_DTYPE.__getitem__, dtypes))
    return True
