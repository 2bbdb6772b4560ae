"""Replace the two functions of `megatron.core.optimizer.clip_grads`, with the same signatures."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ...extend import Shard, Shards, get_total_norm, is_dtensor, name_tensors, scale_

__all__ = ["clip_grad_by_total_norm_fp32", "get_grad_norm_fp32"]


def get_grad_norm_fp32(
    grads_for_norm: Iterable[Tensor] | Tensor,
    norm_type: int | float = 2,
    grad_stats_parallel_group: dist.ProcessGroup | None = None,
) -> float:
    r"""Compute the norm of gradients over the ranks of a group, :math:`(\sum |g|^p)^{1/p}`.

    Args:
        grads_for_norm: the gradients of this rank as `MegatronOptimizer.get_main_grads_for_grad_norm` filters them, so
            that no rank of the group passes a replica of another rank's gradient. Any dtype and device; may be empty.
            DTensors are measured by their placements.
        norm_type: p, any number. `inf` for the largest element.
        grad_stats_parallel_group: the group; None for all ranks.

    Returns:
        The norm, the same on every rank of the group.

    Raises: see `distclip.clip_grad_norm_`, on every rank of the group.

    Collectives: one all-reduce of a few float64 numbers over the group and the meshes of DTensors together. The first
    call with a group exchanges the ranks of the group through the store of torch.distributed. Host syncs: one.

    Source: the signature is Megatron-core 0.16's.

    >>> get_grad_norm_fp32([torch.tensor([3.0]), torch.tensor([4.0])])
    5.0
    """
    group = grad_stats_parallel_group
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    return float(get_total_norm(grads_for_norm, float(norm_type), split_over=group))


@torch.no_grad()
def clip_grad_by_total_norm_fp32(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: int | float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    r"""Scale gradients in place by :math:`\min(1, max\_norm / (total\_norm + 10^{-6}))`.

    If the norm is NaN, the gradients stay unchanged, as in Megatron. The caller must skip the step.

    Args:
        parameters: one or several tensors. A tensor that is listed twice is scaled once.
        max_norm: the allowed norm.
        total_norm: the result of `get_grad_norm_fp32`.
        use_decoupled_grad: scale `.decoupled_grad` instead of `.grad`.

    Collectives: none. Host syncs: none.

    Source: the signature is Megatron-core 0.16's.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_by_total_norm_fp32([weight], 1.0, total_norm=5.0)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    coef = max_norm / (total_norm + 1e-6)
    if not coef < 1:
        return
    attribute = "decoupled_grad" if use_decoupled_grad else "grad"
    grads = [(name, getattr(param, attribute, None)) for name, param in name_tensors(parameters)]
    shards = Shards.of(Shard(name, _to_local(grad)) for name, grad in grads if grad is not None)
    if shards.grads:
        scale_(shards, torch.tensor(coef, dtype=torch.float64))


def _to_local(grad: Tensor) -> Tensor:
    return grad.to_local() if is_dtensor(grad) else grad
