"""Answer the questions that depend on the device: dtypes, host reads, graph capture, constants.

`Fact` is a bool that the host may not have read from the device yet.

Support for a new accelerator belongs here. No other module of the pipeline compares `device.type`, except the kernels,
each of which is written for one kind of device.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

__all__ = [
    "ALWAYS",
    "NEVER",
    "Fact",
    "Numbers",
    "accumulation_dtype",
    "as_fact",
    "copy_to_host_async",
    "current_device",
    "device_constant",
    "free_host_memory",
    "has_addresses",
    "has_fast_float64",
    "has_float64",
    "host_reads_free",
    "is_capturing",
    "is_fake",
    "is_tracing",
    "lacks_real_tensors",
    "move",
    "odd_numbers",
    "on_one_thread",
    "outside_fake_mode",
    "outside_modes",
    "prefers_foreach",
    "rounds_grad_scale",
    "runs_triton",
    "simulated_ranks",
    "without_autograd",
]

N = TypeVar("N", bound=float)
P = ParamSpec("P")
R = TypeVar("R")


class Fact:
    """A bool that every rank shares, and that the host may not have read yet.

    On a CPU the host reads it at once. On an accelerator the bool stays a tensor until `read`, so that the host does
    not wait for the device unless it must.

    Args:
        value: a bool, or a 0-d bool tensor.

    >>> finite, failed = Fact(torch.tensor(True)), Fact(False)
    >>> finite.host, (finite & ~failed).read(), (finite | failed).host
    (True, True, True)
    """

    __slots__ = ("_tensor", "host")

    def __init__(self, value: bool | Tensor) -> None:
        self.host: bool | None
        self._tensor: Tensor | None
        if not isinstance(value, Tensor):
            self.host, self._tensor = value, None
        else:
            self.host, self._tensor = bool(value) if host_reads_free(value.device) else None, value

    def read(self) -> bool:
        """Return the value on the host.

        Host syncs: one on an accelerator, the first time.
        """
        if self.host is None:
            self.host = bool(self._tensor)
        return self.host

    def on(self, device: torch.device) -> Tensor:
        """Return the value as a 0-d bool tensor. Host syncs: none."""
        if self._tensor is None:
            return torch.full((), bool(self.host), dtype=torch.bool, device=device)
        return self._tensor

    def select(self, if_true: Tensor, if_false: Tensor) -> Tensor:
        """Return `if_true` where the fact holds, otherwise `if_false`. Host syncs: none."""
        if self.host is not None:
            return if_true if self.host else if_false
        assert self._tensor is not None
        return torch.where(self._tensor, if_true, if_false)

    def __invert__(self) -> Fact:
        if self.host is not None:
            return NEVER if self.host else ALWAYS
        assert self._tensor is not None
        return Fact(~self._tensor)

    def __and__(self, other: Fact) -> Fact:
        if self.host is not None:
            return other if self.host else self
        if other.host is not None:
            return self if other.host else other
        assert self._tensor is not None
        assert other._tensor is not None
        return Fact(self._tensor & other._tensor)

    def __or__(self, other: Fact) -> Fact:
        if self.host is not None:
            return self if self.host else other
        if other.host is not None:
            return other if other.host else self
        assert self._tensor is not None
        assert other._tensor is not None
        return Fact(self._tensor | other._tensor)

    def __bool__(self) -> bool:
        # An implicit bool() would hide a host sync, and `is None` checks would go wrong silently.
        raise TypeError("Fact: the host may not have read it. Use .read(), or .host for what the host has read.")

    def __repr__(self) -> str:
        return f"Fact({self.host})"


ALWAYS, NEVER = Fact(True), Fact(False)
"""Facts whose values the host has."""


def as_fact(value: bool | Tensor) -> Fact:
    """Return a bool or a 0-d bool tensor as a fact."""
    return NEVER if value is False else ALWAYS if value is True else Fact(value)


def has_float64(device: torch.device) -> bool:
    """Return whether the device computes in float64. Apple's devices do not, nor do some of Intel's.

    >>> has_float64(torch.device("cpu")), has_float64(torch.device("mps"))
    (True, False)
    """
    if device.type == "xpu":
        return _xpu_has_float64(device.index)
    return device.type != "mps"


@functools.cache
def _xpu_has_float64(index: int | None) -> bool:
    return bool(torch.xpu.get_device_properties(index).has_fp64)


def has_fast_float64(device: torch.device) -> bool:
    """Return whether float64 is at most four times slower than float32.

    It is 64 times slower on most GPUs.

    >>> has_fast_float64(torch.device("cpu")), has_fast_float64(torch.device("mps"))
    (True, False)
    """
    if device.type == "cuda" and not torch.version.hip:
        return _capability(device.index) in _FAST_FLOAT64
    return has_float64(device)


_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of P100, V100, A100, H100 and H200, B200. B300, (10, 3), and all other cards are slower."""


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of power sums and norms: float64, or float32 on a device without float64.

    Sums are as precise in both cases. Without float64, a sum is a pair of float32 numbers until it is complete: its
    rounded value and the remainder. A float32 sum of squares overflows for a norm above 1.8e19.

    >>> accumulation_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float64 if has_float64(device) else torch.float32


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, in float32 if the device lacks its float64. Host syncs: none.

    >>> move(torch.tensor(0.5, dtype=torch.float64), torch.device("cpu")).dtype
    torch.float64
    """
    if tensor.dtype == torch.float64 and not has_float64(device):
        tensor = tensor.to(torch.float32)
    return tensor.to(device)


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton, if it is installed, compiles for this kind of device.

    >>> runs_triton(torch.device("cuda")), runs_triton(torch.device("xpu")), runs_triton(torch.device("mps"))
    (True, True, False)
    """
    return device.type in ("cuda", "xpu")


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager within which kernels are launched on this device."""
    if device.type == "cpu":
        return nullcontext()
    manager: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return manager


def host_reads_free(device: torch.device) -> bool:
    """Return whether the host reads a tensor of this device without waiting for queued work.

    In a graph the host never does, because the graph is the same for all values.

    >>> host_reads_free(torch.device("cpu")), host_reads_free(torch.device("cuda"))
    (True, False)
    """
    # Comparing a device takes a third of the time of reading its type.
    return (device == _CPU or device.type == "cpu") and not is_tracing()


def is_tracing() -> bool:
    """Return whether torch.compile, make_fx or torch.export traces this code into a graph.

    >>> is_tracing()
    False
    """
    if _is_dynamo_compiling():
        return True
    if _len_stack() > 0 and torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    # torch.export(strict=False) and make_fx(pre_dispatch=True) trace above torch's autograd, with another stack of
    # modes.
    return _is_key_included(_PRE_DISPATCH) and _mode_above_autograd(_PROXY) is not None


_CPU = torch.device("cpu")

# These are names without a module, because each step looks them up many times.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_len_stack, _is_key_included = torch._C._len_torch_dispatch_stack, torch._C._dispatch_tls_is_dispatch_key_included
_mode_above_autograd: Callable[[Any], Any] = torch._ops._get_dispatch_mode_pre_dispatch
_PROXY, _PRE_DISPATCH = torch._C._TorchDispatchModeKey.PROXY, torch._C.DispatchKey.PreDispatch


def lacks_real_tensors() -> bool:
    """Return whether a graph is traced with fake tensors only, so that a clipper's state cannot take part.

    >>> lacks_real_tensors()
    False
    """
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return False
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode is not None and not mode.allow_non_fake_inputs


def prefers_foreach(device: torch.device) -> bool:
    """Return whether torch's multi-tensor operators are faster than single ones on this device."""
    return device.type in ("cuda", "xpu")


class on_one_thread:
    """Compute on one thread within the block, if several threads do not speed up vectors of this length.

    torch splits vectors of more than 32,768 elements between threads. On a busy machine each such operator waits for
    the slowest thread, which costs more than the operator itself.

    Args:
        count: number of elements of the vectors.
        device: device of the vectors. Nothing changes unless it is a CPU.

    >>> with on_one_thread(50_000, torch.device("cpu")):
    ...     torch.get_num_threads()
    1
    """

    __slots__ = ("_threads",)

    def __init__(self, count: int, device: torch.device) -> None:
        is_short = _SERIAL < count <= _SERIAL * 16 and device.type == "cpu"
        self._threads = torch.get_num_threads() if is_short else 1

    def __enter__(self) -> None:
        if self._threads > 1:
            torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        if self._threads > 1:
            torch.set_num_threads(self._threads)


_SERIAL = 1 << 15
"""Number of elements up to which torch uses one thread anyway."""


def rounds_grad_scale(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether fused optimizers round `grad_scale` to the dtype of their parameters.

    The CPU kernels do, which is an error of 0.4 % for bfloat16.

    >>> rounds_grad_scale(torch.device("cpu"), torch.bfloat16), rounds_grad_scale(torch.device("cuda"), torch.bfloat16)
    (True, False)
    """
    return device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)


def has_addresses(device: torch.device) -> bool:
    """Return whether `data_ptr` of a tensor on this device is the address of its elements.

    >>> has_addresses(torch.device("cpu")), has_addresses(torch.device("meta"))
    (True, False)
    """
    return device.type not in ("meta", "xla", "lazy")


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no elements because it was made under torch's FakeTensorMode.

    >>> is_fake(torch.zeros(1))
    False
    """
    return isinstance(tensor, FakeTensor)


def simulated_ranks() -> frozenset[int] | None:
    """Return the ranks that torch's LocalTensorMode simulates in this process, or None without it."""
    module: Any = sys.modules.get("torch.distributed._local_tensor")
    mode = None if module is None else module.local_tensor_mode()
    return None if mode is None else mode.ranks


def _local_tensor_mode() -> Any:
    """Return torch's LocalTensorMode, or None if it is not enabled."""
    module: Any = sys.modules.get("torch.distributed._local_tensor")
    return None if module is None else module.enabled_local_tensor_mode()


def outside_fake_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Disable FakeTensorMode or LocalTensorMode during a function, so that it computes with real numbers.

    A tensor that the function returns becomes a fake or a local tensor, which the program can compute with under the
    mode.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._len_torch_dispatch_stack() == 0:
            return function(*args, **kwargs)
        if (simulated := _local_tensor_mode()) is not None:
            with simulated.disable():
                result = function(*args, **kwargs)
                if not isinstance(result, Tensor):
                    return result
                return cast("R", simulated.rank_map(lambda _: result.clone()))
        with unset_fake_temporarily() as mode:
            result = function(*args, **kwargs)
            if not isinstance(result, Tensor) or not isinstance(mode, FakeTensorMode):
                return result
            fake: Any = mode.from_tensor(result)
            return cast("R", fake)

    return call


def without_autograd(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without autograd.

    If autograd is off already, as within another such function, this costs less than `torch.no_grad`.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call


def outside_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without autograd, and outside of FakeTensorMode and LocalTensorMode."""
    return outside_fake_mode(without_autograd(function))


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured, in whose replays the host takes no part."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def copy_to_host_async(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start to copy a small tensor to the host.

    Args:
        tensor: of any dtype and shape.

    Returns:
        The tensor on the host, and a function that waits until its values have arrived. A device without asynchronous
        copies returns the tensor itself, which waits when it is read.

    Host syncs: none before the returned function is called.
    """
    if tensor.device.type != "cuda":
        return tensor, lambda: None
    return tensor.to("cpu", non_blocking=True), torch.cuda.current_stream(tensor.device).record_event().synchronize


class Numbers(tuple[N, ...]):
    """Numbers for `device_constant`, whose hash is computed once.

    >>> hash(Numbers((1.0, 2.0))) == hash((1.0, 2.0))
    True
    """

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash


def device_constant(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of numbers that are the same at every step. The caller must not write to it.

    Args:
        numbers: the elements, in order. `Numbers` if they are many.
        device: where the tensor is needed.
        dtype: dtype of the tensor. None infers it as `torch.tensor` does.

    Returns:
        (len(numbers),). The numbers travel to the device once, unless a dispatch mode such as FakeTensorMode is active:
        a tensor that was made under a mode must not be used outside of it.

    >>> device_constant((1.0, 2.0), torch.device("cpu"))
    tensor([1., 2.])
    """
    if is_tracing() and dtype is not None:
        # A kernel writes each number, because the capture of a CUDA graph allows no copy from the host.
        return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
    if torch._C._len_torch_dispatch_stack() > 0:
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _cached_constant(numbers, device, dtype)


def odd_numbers(count: int, device: torch.device) -> Tensor:
    """Return the first odd numbers, (count,) int64. The caller must not write to them. Host syncs: none.

    >>> odd_numbers(3, torch.device("cpu"))
    tensor([1, 3, 5])
    """
    if torch._C._len_torch_dispatch_stack() > 0:
        return torch.arange(1, 2 * count, 2, device=device)
    return _cached_odd_numbers(count, device)


@functools.lru_cache(maxsize=64)
def _cached_odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * count, 2, device=device)


@functools.lru_cache(maxsize=512)
def _cached_constant(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def free_host_memory() -> int:
    """Return the bytes of free memory of this machine, or a large number where it is unknown."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**40
