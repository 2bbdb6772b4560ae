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
    """The C functions, and what of torch they use: the threads of its OpenMP, its table of DLPack functions (None where
    this torch has none, up to 2.10).

    Args:
        path: of the shared library.

    Raises:
        OSError, AttributeError: it cannot be loaded, or is none of ours.
    """

    def __init__(self, path: str) -> None:
        number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        # With the GIL, which looking at Python objects needs; what Python raises there is raised here.
        with_gil, without = ctypes.PyDLL(path), ctypes.CDLL(path)
        self.describe: Any = with_gil.distclip_describe
        self.describe.argtypes = [pointer, size, pointer, number, pointer, pointer, pointer]
        self.power_sums: Any = without.distclip_power_sums
        self.power_sums.argtypes = [number, size, pointer, pointer, pointer, pointer, number, pointer]
        self.scale: Any = without.distclip_scale
        self.scale.argtypes = [ctypes.c_double, size, pointer, pointer, pointer, number, pointer]
        self.openmp = _openmp()
        self.dlpack = _dlpack()
        with_gil.distclip_speaks.argtypes = [pointer]
        if self.dlpack is not None and not with_gil.distclip_speaks(self.dlpack):
            self.dlpack = None


def _dlpack() -> int | None:
    """The address of torch's DLPack exchange API."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return None if capsule is None else address(capsule, b"dlpack_exchange_api")


def _openmp() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch brings; None where it brings another, or none."""
    home = Path(torch.__file__).parent
    for path in (*home.glob("lib/libgomp*"), *home.parent.glob("torch.libs/libgomp*")):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    return None


@functools.cache
def library() -> Library | None:
    """The C library; None where it was not built."""
    spec = importlib.util.find_spec("distclip.norms.kernels._native")
    try:
        return None if spec is None or spec.origin is None else Library(spec.origin)
    except (OSError, AttributeError):
        return None
