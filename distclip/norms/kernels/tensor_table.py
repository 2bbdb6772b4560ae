"""Where tensors lie in memory, as tables that C and GPU kernels read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .native_library import library
from .torch_ops import is_dense

__all__ = ["DTYPES", "OPERATIONS", "Description", "describe"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The number that kernels have for a dtype is its place here."""

OPERATIONS = {2.0: 0, 1.0: 1, math.inf: 2}
"""The number that kernels have for the power sums, or the maximum, of each p that they know."""

_PLAIN = {Tensor, torch.nn.Parameter}

_DEVICES = {"cpu": 1, "cuda": 2}
"""DLPack's numbers."""


class Description:
    """Addresses, lengths (elements) and dtypes (places in `DTYPES`) of tensors.

    Args:
        count: of tensors.
    """

    def __init__(self, count: int) -> None:
        self.addresses, self.lengths = array("q", bytes(8 * count)), array("q", bytes(8 * count))
        self.dtypes = array("i", bytes(4 * count))

    @property
    def wide(self) -> bool:
        """Whether one of the tensors is float64."""
        return 0 in self.dtypes

    def pointers(self) -> list[int]:
        """The addresses of the tables themselves."""
        return [table.buffer_info()[0] for table in (self.addresses, self.lengths, self.dtypes)]


def describe(tensors: Sequence[Tensor], device: str) -> Description | None:
    """Where tensors lie, if all of them are dense, real, and on that kind of device.

    Args:
        tensors: any number.
        device: "cpu" or "cuda".

    Returns:
        None where one of them is something else; a subclass is, whose memory may be elsewhere or nowhere.

    >>> found = describe([torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)], "cpu")
    >>> list(found.lengths), list(found.dtypes)
    ([6, 4], [1, 2])
    """
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    found, c = Description(len(tensors)), library()
    if c is None or c.dlpack is None:
        return found if _described(found, tensors, device) else None
    objects = array("q", list(map(id, tensors)))
    try:
        other = c.describe(c.dlpack, len(tensors), objects.buffer_info()[0], _DEVICES[device], *found.pointers())
    except (BufferError, RuntimeError):
        # DLPack's word for what it cannot tell: a sparse layout.
        return None
    return None if other else found


def _described(found: Description, tensors: Sequence[Tensor], device: str) -> bool:
    """Fill in a description without DLPack; whether all tensors fit into it."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES or tensor.device.type != device or not is_dense(tensor):
            return False
        found.addresses[i], found.lengths[i] = tensor.data_ptr(), tensor.numel()
        found.dtypes[i] = DTYPES.index(tensor.dtype)
    return True
