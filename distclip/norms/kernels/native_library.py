"""Load native.c, which is compiled when distclip is installed and a C compiler is available (see pyproject.toml)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

__all__ = ["Library", "load_library"]


class Library:
    """Functions of the shared library, and the addresses of functions that it calls.

    `list_item` is the address of PyList_GetItem. `openmp` is that of GOMP_parallel, or None. `dlpack` is that of the
    DLPack exchange API of torch, or None up to torch 2.10, which has none.

    Args:
        path: of the shared library.

    Raises:
        OSError, AttributeError: the file cannot be loaded, or lacks one of the functions.
    """

    def __init__(self, path: str) -> None:
        number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        # `describe` inspects Python objects, so it must hold the GIL. PyDLL also raises the exceptions it sets.
        with_gil, without_gil = ctypes.PyDLL(path), ctypes.CDLL(path)
        self.describe: Any = with_gil.distclip_describe
        self.describe.argtypes = [pointer, size, ctypes.py_object, pointer, number, pointer, pointer, pointer]
        self.measure: Any = without_gil.distclip_measure
        self.measure.argtypes = [number, size, pointer, pointer, pointer, pointer, pointer, number, pointer]
        self.measure_rows: Any = without_gil.distclip_measure_rows
        self.measure_rows.argtypes = [number, size, *[pointer] * 8, number, pointer]
        self.scale: Any = without_gil.distclip_scale
        self.scale.argtypes = [ctypes.c_double, size, pointer, pointer, pointer, number, pointer]
        self.list_item = ctypes.cast(ctypes.pythonapi.PyList_GetItem, pointer).value
        self.openmp = _find_openmp()
        self.dlpack = _find_dlpack()


def _find_dlpack() -> int | None:
    """Return the address of torch's DLPack exchange API, or None if torch has none."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return None if capsule is None else address(capsule, b"dlpack_exchange_api")


def _find_openmp() -> int | None:
    """Return the address of GOMP_parallel in torch's OpenMP library, or None if it is not libgomp."""
    home = Path(torch.__file__).parent
    # Wheels from PyPI have the library in torch/lib, or in torch.libs next to it.
    for path in (*home.glob("lib/libgomp*"), *home.parent.glob("torch.libs/libgomp*")):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    return None


@functools.cache
def load_library() -> Library | None:
    """Load the C library once. Return None if it was not compiled."""
    # The file is not a Python module, but the import system finds it by the suffix that the build gave it.
    spec = importlib.util.find_spec("distclip.norms.kernels._native")
    try:
        return None if spec is None or spec.origin is None else Library(spec.origin)
    except (OSError, AttributeError):
        return None
