"""The C kernel: sums of powers of all of a CPU's tensors in one call, on all of its cores.

Built where a C compiler is at hand when distclip is installed (see pyproject.toml), and done without where it was not.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from array import array
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["library", "power_sums", "takes"]

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

_OPERATIONS = {2.0: 0, 1.0: 1, math.inf: 2}

_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")


def takes(tensors: Sequence[Tensor], norm_type: float) -> bool:
    """Whether `power_sums` can do it: dense real tensors of one dtype in the memory of a CPU, p = 1, 2 or inf."""
    if norm_type not in _OPERATIONS or library() is None:
        return False
    dtypes = set(map(_dtype, tensors))
    if len(dtypes) > 1 or not dtypes <= _DTYPES.keys() or not all(map(attrgetter("is_cpu"), tensors)):
        return False
    if set(map(attrgetter("layout"), tensors)) != {torch.strided}:
        return False
    return all(map(Tensor.is_contiguous, tensors)) or all(map(torch.ops.aten.is_non_overlapping_and_dense, tensors))


def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Σ|g|^p of each tensor, or its max|g|, (n,) float64.

    Args:
        tensors: at least one, that `takes`.
        norm_type: p.

    The bits depend on the elements and their order alone, not on threads, alignment or neighbours; bfloat16 squares are
    added up in float32 by 2,048, everything else in float64.

    >>> tensors = [torch.tensor([300.0, 400.0], dtype=torch.float16), torch.zeros(0, dtype=torch.float16)]
    >>> power_sums(tensors, 2.0) if takes(tensors, 2.0) else torch.tensor([250000.0, 0.0], dtype=torch.float64)
    tensor([250000.,      0.], dtype=torch.float64)
    """
    pointers, lengths = array("q", map(Tensor.data_ptr, tensors)), array("q", map(Tensor.numel, tensors))
    sums = torch.empty(len(tensors), dtype=torch.float64)
    kernel = library()
    assert kernel is not None
    failed = kernel(
        _OPERATIONS[norm_type],
        _DTYPES[tensors[0].dtype],
        len(tensors),
        pointers.buffer_info()[0],
        lengths.buffer_info()[0],
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the table of {len(tensors)} tensors")
    return sums


@functools.cache
def library() -> Any:
    """`distclip_power_sums` of native.c; None where it was not built."""
    try:
        spec = importlib.util.find_spec("distclip.kernels._native")
        if spec is None or spec.origin is None:
            return None
        kernel = ctypes.CDLL(spec.origin).distclip_power_sums
    except (OSError, AttributeError):
        return None
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    kernel.argtypes = [number, number, size, pointer, pointer, pointer, number]
    kernel.restype = number
    return kernel
