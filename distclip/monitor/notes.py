"""Convert the values that a user notes for a step immediately, so that a write cannot fail because of them.

A write communicates. If a value could not be read there, its rank would not enter a collective in which the other ranks
wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from ..devices import host_reads_free
from ..errors import short_repr
from ..sharding.dtensor import is_dtensor

__all__ = ["convert_ids", "convert_note", "convert_step"]

Number = int | float | bool

_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
_DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
"""Dtypes that every device can stack and copy."""


def convert_note(value: Any) -> Number | Tensor:
    """Return a value as a Python number, or as a tensor of one element that a write reads later.

    Args:
        value: a number of Python, NumPy or another library, or an array or tensor of one element.

    Raises:
        ValueError: it is something else. The message describes it.

    Host syncs: none, or one for a tensor of a subclass or of a rare dtype.
    """
    if isinstance(value, Tensor):
        return _convert_tensor(value)
    if isinstance(value, str | bytes | bytearray):
        raise ValueError("it is text")
    try:
        number = value.item()  # of NumPy's scalars and arrays, and those of other libraries
    except AttributeError:
        number = value
    if not isinstance(number, SupportsFloat | SupportsIndex):
        raise ValueError(f"it is of type {type(value).__name__}")
    approximate = float(number)  # raises for an int beyond the range of a float
    return approximate if not isinstance(number, int) else number if isinstance(number, bool) else int(number)


def convert_step(value: Any) -> int | Tensor:
    """Return the number of a step, or a tensor with it if the host would have to wait for it.

    Raises:
        ValueError: see `convert_note`; it is not a whole number.
    """
    number = convert_note(value)
    if isinstance(number, Tensor):
        if not host_reads_free(number.device):
            return number
        number = number.item()
    if isinstance(number, bool) or not float(number).is_integer() or abs(number) >= 2**63:
        raise ValueError("the number of a step is a whole number")
    return int(number)


def convert_ids(ids: Any) -> tuple[Any, ...] | Tensor:
    """Return sample ids as Python numbers and strings, or as a 1-D tensor that a write reads later.

    Args:
        ids: a sequence or set of numbers and texts, or a 1-D array or tensor.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(ids, Tensor):
        if is_dtensor(ids):
            raise ValueError("it is a DTensor. Pass its to_local()")
        _check_real(ids)
        if ids.ndim != 1:
            raise ValueError(f"it has {ids.ndim} dims")
        return ids.detach() if type(ids) is Tensor and not host_reads_free(ids.device) else tuple(ids.tolist())
    if isinstance(ids, str | bytes | bytearray | Mapping) or not (isinstance(ids, Iterable) and isinstance(ids, Sized)):
        raise ValueError(f"it is of type {type(ids).__name__}")
    array: Any = ids
    try:
        listed = tuple(array.tolist())
    except AttributeError:
        listed = tuple(ids)
    if not {type(one) for one in listed} <= {int, str, float}:
        listed = tuple(map(_convert_id, listed))
    return listed


def _convert_tensor(tensor: Tensor) -> Number | Tensor:
    if is_dtensor(tensor):
        # Reading shards or partial sums needs a collective, which other ranks may not enter.
        if not all(placement.is_replicate() for placement in tensor.placements):
            raise ValueError(f"it is a DTensor with placements {tensor.placements}. Pass its full_tensor()")
        tensor = tensor.to_local()
    _check_real(tensor)
    if tensor.numel() != 1:
        raise ValueError(f"it has {tensor.numel()} elements")
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype not in _DTYPES:
        # A tensor of a subclass may read differently later, or not at all.
        return float(tensor.detach())
    # It is detached, because a loss would keep its autograd graph alive until the next write.
    return tensor.detach()


def _check_real(tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError("it is a meta tensor, which has no values")
    if tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized:
        raise ValueError(f"it has layout {tensor.layout} and dtype {tensor.dtype}")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError("it belongs to a transform of torch.func. Note it outside")


def _convert_id(one: Any) -> Any:
    if isinstance(one, str):
        return str(one)
    try:
        number = convert_note(one)
        return number.item() if isinstance(number, Tensor) else number
    except Exception:
        raise ValueError(f"{short_repr(one)} is neither a number nor text") from None
