"""Make parameters whose whole gradients every rank can compute."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

__all__ = ["dtensor_param", "full_grads", "plain_param", "random_grad", "tagged_param"]


def random_grad(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Return a whole gradient, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain_param(grad: Tensor | None, shape: tuple[int, ...] = ()) -> nn.Parameter:
    """Make a plain parameter with a copy of that gradient, or one of that shape without a gradient."""
    param = nn.Parameter(torch.zeros(shape) if grad is None else torch.zeros(grad.shape, dtype=grad.dtype))
    param.grad = None if grad is None else grad.clone()
    return param


def tagged_param(grad: Tensor, **tags: object) -> nn.Parameter:
    """Make a plain parameter with Megatron's attributes."""
    param = plain_param(grad)
    for name, value in tags.items():
        setattr(param, name, value)
    return param


def dtensor_param(grad: Tensor, mesh: DeviceMesh, placements: list[Shard | Replicate]) -> nn.Parameter:
    """Make a DTensor parameter with that whole gradient. No communication."""
    param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None))
    param.grad = distribute_tensor(grad, mesh, placements, src_data_rank=None)
    return param


def full_grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the whole gradients of DTensor or plain parameters."""
    return [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters if p.grad is not None
    ]
