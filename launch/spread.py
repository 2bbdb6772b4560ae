"""One gradient, spread over ranks in every way of the table that `truth.py` prints."""

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
STAGES = (("embedding",), ("attention", "projection"), ("norm", "experts"), ("head",))


def gradient() -> Gradient:
    """The whole gradient: the same numbers on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {name: 30 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cast(dtype: torch.dtype) -> Gradient:
    return {name: grad.to(dtype) for name, grad in gradient().items()}


@dataclass
class Held:
    """What one rank holds: its parameters, and what else has to be told about them."""

    parameters: Sequence[Tensor]
    module: nn.Module | None = None
    split_over: DeviceMesh | None = None


@dataclass(frozen=True)
class Spread:
    """A row of the table: `place` lays the whole gradient out on this rank."""

    layout: str
    place: Callable[[Gradient], Held]
    whole: Callable[[], Gradient] = gradient
    norm_type: float = 2.0
    ranks: int = 4


class Known(nn.Module):
    """A model whose gradient is given: the loss is Σ parameter · gradient."""

    def __init__(self, whole: Gradient) -> None:
        super().__init__()
        self.whole = whole
        for name, grad in whole.items():
            self.register_parameter(name, nn.Parameter(torch.zeros_like(grad)))

    def forward(self) -> Tensor:
        return torch.stack([(getattr(self, name) * grad).sum() for name, grad in self.whole.items()]).sum()


@lru_cache
def mesh_of(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def plain(grad: Tensor) -> nn.Parameter:
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    return param


def laid(grad: Tensor, mesh: DeviceMesh, *placements: Placement) -> nn.Parameter:
    """This rank's piece of a parameter and of its gradient."""
    param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None))
    param.grad = distribute_tensor(grad.clone(), mesh, placements, src_data_rank=None)
    return param


def trained(model: nn.Module) -> Held:
    """After a real backward pass, through whatever the model is wrapped in."""
    model().backward()
    return Held(list(model.parameters()), model)


def one_process(whole: Gradient) -> Held:
    return Held([plain(grad) for grad in whole.values()])


def listed_twice(whole: Gradient) -> Held:
    parameters = [plain(grad) for grad in whole.values()]
    return Held([*parameters, parameters[0]])


def ddp(whole: Gradient) -> Held:
    return trained(DistributedDataParallel(Known(whole)))


def fsdp1(whole: Gradient) -> Held:
    return trained(FullyShardedDataParallel(Known(whole), device_id=torch.device("cpu")))


def fsdp2(whole: Gradient) -> Held:
    model = Known(whole)
    fully_shard(model, mesh=mesh_of(fsdp=4))
    return trained(model)


def tensor_parallel(whole: Gradient) -> Held:
    tp = mesh_of(tp=4)
    by_row = {"projection", "experts"}
    sharded = [laid(g, tp, Shard(1 if name in by_row else 0)) for name, g in whole.items() if name != "norm"]
    return Held([*sharded, plain(whole["norm"])])


def expert_parallel(whole: Gradient) -> Held:
    dense, sparse = mesh_of(fsdp=4), mesh_of(ep=2, efsdp=2)
    experts = laid(whole["experts"], sparse, Shard(0), Shard(1))
    return Held([*(laid(g, dense, Shard(0)) for name, g in whole.items() if name != "experts"), experts])


def pipeline(whole: Gradient) -> Held:
    pp = mesh_of(pp=4)
    return Held([plain(whole[name]) for name in STAGES[pp.get_local_rank()]], split_over=pp)


def pipeline_fsdp2(whole: Gradient) -> Held:
    mesh = mesh_of(pp=2, fsdp=2)
    first = 2 * mesh.get_local_rank("pp")
    stage = Known({name: whole[name] for names in STAGES[first : first + 2] for name in names})
    fully_shard(stage, mesh=mesh["fsdp"])
    held = trained(stage)
    held.split_over = mesh["pp"]
    return held


def last_rank_zero() -> Gradient:
    """What is left of the gradient if the last of four ranks got none of its rows."""
    whole = gradient()
    for grad in whole.values():
        grad[3 * len(grad) // 4 :] = 0
    return whole


def last_rank_without(whole: Gradient) -> Held:
    held = fsdp2(whole)
    if dist.get_rank() == 3:
        for param in held.parameters:
            param.grad = None
    return held


SPREADS = (
    Spread("one process", one_process, ranks=1),
    Spread("DDP", ddp),
    Spread("FSDP2", fsdp2),
    Spread("tensor parallel + plain norm", tensor_parallel),
    Spread("experts on another mesh", expert_parallel),
    Spread("pipeline", pipeline),
    Spread("pipeline x FSDP2", pipeline_fsdp2),
    Spread("FSDP1", fsdp1),
    Spread("FSDP2, fp16", fsdp2, lambda: cast(torch.float16)),
    Spread("FSDP2, bf16", fsdp2, lambda: cast(torch.bfloat16)),
    Spread("FSDP2, fp32 of 1e25", fsdp2, lambda: {name: grad * 1e25 for name, grad in gradient().items()}),
    Spread("FSDP2, inf-norm", fsdp2, norm_type=math.inf),
    Spread("FSDP2, a rank without gradients", last_rank_without, last_rank_zero),
    Spread("one process, a parameter listed twice", listed_twice, ranks=1),
)
