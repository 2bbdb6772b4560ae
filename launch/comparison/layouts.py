"""Distribute one gradient over ranks in every layout of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Placement, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Gradient = dict[str, Tensor]

SHAPES = {
    "embedding": (24, 8),
    "attention": (24, 8),
    "projection": (8, 8),
    "norm": (8,),
    "experts": (4, 8, 8),
    "head": (24, 8),
}
PIPELINE_STAGES = (("embedding",), ("attention", "projection"), ("norm", "experts"), ("head",))


def full_gradient(dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Gradient:
    """Return the whole gradient, which is equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    grads = {name: 30 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (grad * factor).to(dtype) for name, grad in grads.items()}


def gradient_of_three_ranks() -> Gradient:
    """Return the gradient with zeros in the rows that FSDP2 gives to the last of four ranks."""
    gradient = full_gradient()
    for grad in gradient.values():
        grad[3 * len(grad) // 4 :] = 0
    return gradient


@dataclass
class LocalParameters:
    """Parameters of this rank, with the arguments that distclip needs for them."""

    parameters: Sequence[Tensor]
    module: nn.Module | None = None
    split_over: DeviceMesh | None = None


@dataclass(frozen=True)
class LayoutCase:
    """A row of the table.

    Args:
        name: first cell of the row.
        distribute: function that gives this rank its share of a whole gradient.
        gradient: function that returns the whole gradient.
    """

    name: str
    distribute: Callable[[Gradient], LocalParameters]
    gradient: Callable[[], Gradient] = full_gradient
    norm_type: float = 2.0
    num_ranks: int = 4


class LinearModel(nn.Module):
    """A model with a given gradient: its loss is the sum of parameter * gradient."""

    def __init__(self, gradient: Gradient) -> None:
        super().__init__()
        self.gradient = gradient
        for name, grad in gradient.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(grad)))

    def forward(self) -> Tensor:
        # FSDP1 replaces the parameters by views, which `get_parameter` rejects.
        return torch.stack([(getattr(self, name) * grad).sum() for name, grad in self.gradient.items()]).sum()


@lru_cache
def mesh_of(**axes: int) -> DeviceMesh:
    """Return the CPU mesh with these axes."""
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def plain_parameter(grad: Tensor) -> nn.Parameter:
    """Return a parameter with a whole gradient."""
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    return param


def sharded_parameter(grad: Tensor, mesh: DeviceMesh, *placements: Placement) -> nn.Parameter:
    """Return this rank's shard of a parameter, with its gradient."""
    param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None))
    param.grad = distribute_tensor(grad.clone(), mesh, placements, src_data_rank=None)
    return param


def run_backward(model: nn.Module) -> LocalParameters:
    """Run a real backward pass through the model and its wrappers."""
    model().backward()
    return LocalParameters(list(model.parameters()), model)


def one_process(gradient: Gradient) -> LocalParameters:
    return LocalParameters([plain_parameter(grad) for grad in gradient.values()])


def listed_twice(gradient: Gradient) -> LocalParameters:
    parameters = [plain_parameter(grad) for grad in gradient.values()]
    return LocalParameters([*parameters, parameters[0]])


def ddp(gradient: Gradient) -> LocalParameters:
    return run_backward(DistributedDataParallel(LinearModel(gradient)))


def fsdp1(gradient: Gradient) -> LocalParameters:
    return run_backward(FullyShardedDataParallel(LinearModel(gradient), device_id=torch.device("cpu")))


def fsdp2(gradient: Gradient) -> LocalParameters:
    model = LinearModel(gradient)
    fully_shard(model, mesh=mesh_of(fsdp=4))
    return run_backward(model)


def tensor_parallel(gradient: Gradient) -> LocalParameters:
    tp = mesh_of(tp=4)
    row_wise = {"projection", "experts"}
    shards = [
        sharded_parameter(grad, tp, Shard(1 if name in row_wise else 0))
        for name, grad in gradient.items()
        if name != "norm"
    ]
    return LocalParameters([*shards, plain_parameter(gradient["norm"])])


def expert_parallel(gradient: Gradient) -> LocalParameters:
    dense, sparse = mesh_of(fsdp=4), mesh_of(ep=2, efsdp=2)
    experts = sharded_parameter(gradient["experts"], sparse, Shard(0), Shard(1))
    shards = [sharded_parameter(grad, dense, Shard(0)) for name, grad in gradient.items() if name != "experts"]
    return LocalParameters([*shards, experts])


def pipeline(gradient: Gradient) -> LocalParameters:
    pp = mesh_of(pp=4)
    names = PIPELINE_STAGES[pp.get_local_rank()]
    return LocalParameters([plain_parameter(gradient[name]) for name in names], split_over=pp)


def pipeline_fsdp2(gradient: Gradient) -> LocalParameters:
    mesh = mesh_of(pp=2, fsdp=2)
    first = 2 * mesh.get_local_rank("pp")
    stage = LinearModel({name: gradient[name] for names in PIPELINE_STAGES[first : first + 2] for name in names})
    fully_shard(stage, mesh=mesh["fsdp"])
    local = run_backward(stage)
    local.split_over = mesh["pp"]
    return local


def fsdp2_without_last_rank(gradient: Gradient) -> LocalParameters:
    local = fsdp2(gradient)
    if dist.get_rank() == 3:
        for param in local.parameters:
            param.grad = None
    return local


CASES = (
    LayoutCase("one process", one_process, num_ranks=1),
    LayoutCase("DDP", ddp),
    LayoutCase("FSDP2", fsdp2),
    LayoutCase("tensor parallel + plain norm", tensor_parallel),
    LayoutCase("experts on another mesh", expert_parallel),
    LayoutCase("pipeline", pipeline),
    LayoutCase("pipeline x FSDP2", pipeline_fsdp2),
    LayoutCase("FSDP1", fsdp1),
    LayoutCase("FSDP2, fp16", fsdp2, lambda: full_gradient(torch.float16)),
    LayoutCase("FSDP2, bf16", fsdp2, lambda: full_gradient(torch.bfloat16)),
    LayoutCase("FSDP2, fp32 of 1e25", fsdp2, lambda: full_gradient(factor=1e25)),
    LayoutCase("FSDP2, inf-norm", fsdp2, norm_type=math.inf),
    LayoutCase("FSDP2, a rank without gradients", fsdp2_without_last_rank, gradient_of_three_ranks),
    LayoutCase("one process, a parameter listed twice", listed_twice, num_ranks=1),
)
