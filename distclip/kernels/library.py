"""native.c, loaded. It is built where a C compiler is at hand when distclip is installed, see pyproject.toml."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

__all__ = ["Library", "library"]


class Library:
    """The C functions, and torch's table of DLPack functions that they ask about tensors.

    Args:
        path: of the shared library.

    Raises:
        OSError, AttributeError: it cannot be loaded, or this torch has no such table.
    """

    def __init__(self, path: str) -> None:
        number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = pointer, [ctypes.py_object, ctypes.c_char_p]
        self.dlpack = address(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
        # With the GIL, which looking at Python objects needs; what Python raises there is raised here.
        with_gil, without = ctypes.PyDLL(path), ctypes.CDLL(path)
        self.describe: Any = with_gil.distclip_describe
        self.describe.argtypes = [pointer, size, pointer, number, pointer, pointer, pointer]
        self.power_sums: Any = without.distclip_power_sums
        self.power_sums.argtypes = [number, size, pointer, pointer, pointer, pointer, number, pointer]
        self.openmp = _openmp()
        speaks = with_gil.distclip_speaks
        speaks.argtypes = [pointer]
        if not speaks(self.dlpack):
            raise AttributeError("torch speaks another DLPack")


def _openmp() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch brings; None where it brings another, or none."""
    home = Path(torch.__file__).parent
    for path in (*home.glob("lib/libgomp*"), *home.parent.glob("torch.libs/libgomp*")):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    return None


@functools.cache
def library() -> Library | None:
    """The C library; None where it was not built, or torch is too old to describe tensors to it."""
    spec = importlib.util.find_spec("distclip.kernels._native")
    try:
        return None if spec is None or spec.origin is None else Library(spec.origin)
    except (OSError, AttributeError):
        return None
