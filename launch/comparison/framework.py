"""Clip like the framework of a layout: by FSDP1's own method, or by torchtitan's sum over meshes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .layouts import LocalParameters


def clip_as_frameworks_do(local: LocalParameters, max_norm: float, norm_type: float) -> Tensor:
    """Clip by FSDP1's method, or in other layouts as torchtitan does.

    `torchtitan.distributed.utils.clip_grad_norm_` computes the norm of the experts and of the other parameters
    separately, and adds the stages by hand.
    """
    if isinstance(local.module, FullyShardedDataParallel):
        return local.module.clip_grad_norm_(max_norm, norm_type)
    experts = [param for param in local.parameters if is_on_expert_mesh(param)]
    others = [param for param in local.parameters if not is_on_expert_mesh(param)]
    norms = []
    for params in (experts, others):
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type) if experts else norms[1]
    if local.split_over is not None:
        group = local.split_over.get_group()
        if math.isinf(norm_type):
            dist.all_reduce(norm, dist.ReduceOp.MAX, group)
        else:
            norm **= norm_type
            dist.all_reduce(norm, dist.ReduceOp.SUM, group)
            norm **= 1.0 / norm_type
    for params in (experts, others):
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def is_on_expert_mesh(param: Tensor) -> bool:
    """Return whether the mesh of a parameter has an axis "ep"."""
    return isinstance(param, DTensor) and "ep" in (param.device_mesh.mesh_dim_names or ())
