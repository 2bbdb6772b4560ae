"""Clip with torch's own four functions inside a graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..comm import Comm
from ..devices import accumulation_dtype
from ..norms.kernels.torch_ops import combine
from ..norms.reduce import root
from ..sharding.dtensor import is_dtensor
from ..sharding.parameters import Parameters
from ..sharding.split_over import SplitOver
from . import ops
from .optimizers import local_tensors
from .step import all_reduce, maximum

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    split_over: SplitOver = None,
    comm: Comm | None = None,
) -> Tensor:
    """Clip the norm of the whole gradient, see `distclip.clip_grad_norm_`."""
    grads = _gradients(parameters)
    norm = _total_norm(grads, norm_type)
    if grads and max_norm != math.inf:
        ops.scale_(local_tensors(grads), _coefficient(norm, max_norm))
    return _as_user_dtype(norm, grads)


@torch.no_grad()
def get_total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    split_over: SplitOver = None,
    comm: Comm | None = None,
) -> Tensor:
    """Return the norm of tensors taken together, see `distclip.get_total_norm`."""
    grads = _tensors(tensors)
    return _as_user_dtype(_total_norm(grads, norm_type), grads)


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Clip gradients by a norm that is known already, see `distclip.clip_grads_with_norm_`."""
    grads = _gradients(parameters)
    if grads and max_norm != math.inf:
        ops.scale_(local_tensors(grads), _coefficient(total_norm, max_norm))


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float | tuple[float, float], foreach: bool | None = None
) -> None:
    """Clamp every gradient element, see `distclip.clip_grad_value_`."""
    low, high = clip_value if isinstance(clip_value, tuple) else (-clip_value, clip_value)
    low, high = float(low), float(high)
    grads = _gradients(parameters)
    if grads:
        ops.clamp_(local_tensors(grads), low, high, False)


def reason_against_clip(
    parameters: Any,
    max_norm: Any,
    norm_type: Any = 2.0,
    error_if_nonfinite: Any = False,
    foreach: Any = None,
    *,
    split_over: Any = None,
    comm: Any = None,
) -> str | None:
    """Return the reason why a call of `clip_grad_norm_` cannot be in a graph, or None."""
    return _reason_against_bound(max_norm) or reason_against_norm(
        parameters, norm_type, error_if_nonfinite, foreach, split_over=split_over, comm=comm
    )


def reason_against_norm(
    tensors: Any,
    norm_type: Any = 2.0,
    error_if_nonfinite: Any = False,
    foreach: Any = None,
    *,
    split_over: Any = None,
    comm: Any = None,
) -> str | None:
    """Return the reason why a call of `get_total_norm` cannot be in a graph, or None."""
    if error_if_nonfinite:
        return "error_if_nonfinite=True needs the host: check the norm that is returned"
    if split_over is not None or comm is not None:
        return "split_over= and comm= need the other ranks while the graph is traced: use GradClipper"
    # torch.compile keeps a number that changes between calls as a symbol, and comparisons make guards of it.
    if not isinstance(norm_type, int | float) or not (norm_type >= 0 or norm_type < 0):
        return "norm_type: not a number that the graph can contain"
    sharded: list[Any] = [tensor for tensor in _tensors(tensors) if is_dtensor(tensor)]
    for tensor in sharded:
        both: tuple[Any, Any] = (tensor, tensor.grad)
        for one in both:
            if one is not None and (one.device_mesh != sharded[0].device_mesh or _is_partial(one)):
                return "DTensors on several meshes, or in Partial placement: use GradClipper"
    return None


def _is_partial(tensor: Any) -> bool:
    return any(placement.is_partial() for placement in tensor.placements)


def reason_against_bound(parameters: Any, max_norm: Any, total_norm: Any, foreach: Any = None) -> str | None:
    """Return the reason why a call of `clip_grads_with_norm_` cannot be in a graph, or None."""
    return _reason_against_bound(max_norm)


def _reason_against_bound(max_norm: Any) -> str | None:
    is_bound = isinstance(max_norm, int | float) and max_norm >= 0
    return None if is_bound else "max_norm: not a number ≥ 0 that the graph can contain"


def reason_against_limits(parameters: Any, clip_value: Any, *arguments: Any, **others: Any) -> str | None:
    """Return the reason why a call of `clip_grad_value_` cannot be in a graph, or None."""
    low, high = clip_value if isinstance(clip_value, tuple) else (-clip_value, clip_value)
    return None if low <= high else "clip_value: not a number ≥ 0, nor two with the lower one first"


def _tensors(parameters: Any) -> list[Any]:
    """Return the tensors that a caller passed, each of them once."""
    if isinstance(parameters, Tensor):
        return [parameters]
    several = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    tensors: list[Any] = []
    for one in several:
        tensor = one[1] if isinstance(one, tuple) else one
        if not any(tensor is known for known in tensors):
            tensors.append(tensor)
    return tensors


def _gradients(parameters: Any) -> list[Any]:
    return [tensor.grad for tensor in _tensors(parameters) if tensor.grad is not None]


def _total_norm(tensors: list[Any], norm_type: float) -> Tensor:
    """Return the total norm, 0-d."""
    p = float(norm_type)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    sums = ops.power_sums(local_tensors(tensors), p)
    is_maximum = p in (math.inf, -math.inf)
    if not any(is_dtensor(tensor) for tensor in tensors):
        return root(combine(sums, p), p)
    mesh = next(tensor.device_mesh for tensor in tensors if is_dtensor(tensor))
    shares = []
    for i, tensor in enumerate(tensors):
        num_replicas = mesh.size()
        if is_dtensor(tensor):
            for axis, placement in enumerate(tensor.placements):
                if placement.is_shard():
                    num_replicas //= mesh.size(axis)
        shares.append(sums[i] if is_maximum else sums[i] / num_replicas)
    groups = [mesh.get_group(axis).group_name for axis in range(mesh.ndim)]
    message = combine(torch.stack(shares), p).view(1)
    if is_maximum:
        return root(maximum(message, groups)[0], p)
    for group in groups:
        message = all_reduce(message, "sum", group)
    return root(message[0], p)


def _coefficient(norm: Tensor, max_norm: float) -> Tensor:
    norm = norm.to(accumulation_dtype(norm.device))
    length = norm + 1e-6
    return torch.where((length <= max_norm) | (norm == 0), 1.0, max_norm / length).view(1)


def _as_user_dtype(norm: Tensor, tensors: list[Any]) -> Tensor:
    has_fp64 = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return norm if has_fp64 else norm.to(torch.float32)
