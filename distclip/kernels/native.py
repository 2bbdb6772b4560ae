"""The C kernel: sums of powers of all of a CPU's tensors in one call, on all of its cores.

Built where a C compiler is at hand when distclip is installed (see pyproject.toml), and done without where it was not.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Description", "describe", "library", "power_sums"]

_OPERATIONS = {2.0: 0, 1.0: 1, math.inf: 2}

_DEVICES = {"cpu": 1, "cuda": 2}
"""DLPack's numbers."""


class Description:
    """Where tensors lie: tables for C of their addresses, lengths (elements) and dtypes (the numbers of native.c).

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
        tensors: torch.Tensors or Parameters; of a subclass only what the base class knows is seen.
        device: "cpu" or "cuda".

    Returns:
        None where one of them is something else, or the C library is not there.
    """
    kernel = library()
    if kernel is None:
        return None
    objects, found = array("q", list(map(id, tensors))), Description(len(tensors))
    try:
        other = kernel.describe(
            kernel.dlpack, len(tensors), objects.buffer_info()[0], _DEVICES[device], *found.pointers()
        )
    except (BufferError, RuntimeError):
        # DLPack's word for a layout that it cannot tell: sparse.
        return None
    return None if other else found


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> tuple[Tensor, bool] | None:
    """Σ|g|^p of each tensor, or its max|g|, (n,) float64; and whether any of them is float64.

    Args:
        tensors: any number.
        norm_type: p.

    Returns:
        None where it cannot be done: see `describe`; p is to be 1, 2 or inf.

    The bits depend on the elements and their order alone, not on threads, alignment or neighbours; bfloat16 squares are
    added up in float32 by 2,048, everything else in float64.

    >>> found = power_sums([torch.tensor([300.0, 400.0], dtype=torch.float16), torch.zeros(0)], 2.0)
    >>> found if library() else (torch.tensor([250000.0, 0.0], dtype=torch.float64), False)
    (tensor([250000.,      0.], dtype=torch.float64), False)
    """
    if norm_type not in _OPERATIONS or (found := describe(tensors, "cpu")) is None:
        return None
    sums = torch.empty(len(tensors), dtype=torch.float64)
    kernel = library()
    assert kernel is not None
    threads = torch.get_num_threads()
    if kernel.power_sums(_OPERATIONS[norm_type], len(tensors), *found.pointers(), sums.data_ptr(), threads):
        raise MemoryError(f"no memory for the table of {len(tensors)} tensors")
    return sums, found.wide


class _Library:
    """native.c, loaded, and torch's table of DLPack functions.

    Raises:
        OSError, AttributeError: one of them cannot be had.
    """

    def __init__(self, path: str) -> None:
        number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = pointer, [ctypes.py_object, ctypes.c_char_p]
        # With the GIL, which looking at Python objects needs; what Python raises there is raised here.
        with_gil = ctypes.PyDLL(path)
        self.dlpack = address(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
        self.describe: Any = with_gil.distclip_describe
        self.describe.argtypes = [pointer, size, pointer, number, pointer, pointer, pointer]
        self.power_sums: Any = ctypes.CDLL(path).distclip_power_sums
        self.power_sums.argtypes = [number, size, pointer, pointer, pointer, pointer, number]
        speaks = with_gil.distclip_speaks
        speaks.argtypes = [pointer]
        if not speaks(self.dlpack):
            raise AttributeError("torch speaks another DLPack")


@functools.cache
def library() -> _Library | None:
    """The C library; None where it was not built, or torch is too old to describe tensors to it."""
    spec = importlib.util.find_spec("distclip.kernels._native")
    try:
        return None if spec is None or spec.origin is None else _Library(spec.origin)
    except (OSError, AttributeError):
        return None
