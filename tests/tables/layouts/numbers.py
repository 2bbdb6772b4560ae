"""Enter extreme magnitudes, narrow dtypes and unusual arguments into the table of layouts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from tests.tables.layouts import Case, row
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad

EVEN = (2.0, 1.0, float("inf"))


def sharded(*grads: Tensor) -> Case:
    """Shard each gradient over the world."""
    mesh = world_mesh("fsdp")
    return Case([dtensor_param(g, mesh, [Shard(0)]) for g in grads], list(grads))


@row(2, 4, why="float32, bfloat16 and float16 gradients in one call")
def mixed_dtypes() -> Case:
    return sharded(random_grad(8, 3), random_grad(9, 5, seed=1).bfloat16(), random_grad(7, seed=2).half())


@row(2, 4, why="fp16 elements of 3000: torch squares them in fp16, computes inf and zeroes every gradient")
def fp16_large() -> Case:
    return sharded(torch.full((40, 30), 3000.0, dtype=torch.float16))


@row(2, 4, why="float32 of 1e25: the square overflows float32, and the sum of cubes almost overflows float64")
def fp32_huge() -> Case:
    return sharded(random_grad(8, 3) * 1e25)


@row(2, 4, why="a norm that overflows float32, of elements that do not", norms=(2.0, 1.0))
def fp32_norm_beyond_fp32() -> Case:
    return sharded(torch.full((64, 64), 3e38))


@row(2, 4, why="float32 of 1e-25: the square underflows in float32 and torch reports 0")
def fp32_tiny() -> Case:
    return sharded(random_grad(8, 3) * 1e-25)


@row(2, 4, why="float64 that overflows float32 is no error", norms=EVEN)
def fp64_huge() -> Case:
    case = sharded(random_grad(8, 3).double() * 1e100)
    case.tolerance = 1e-12
    return case


@row(
    1,
    2,
    4,
    why="complex gradients: the norm is that of |z|",
    norms=(2.0, 1.0, 3.0, float("inf")),
)
def complex_numbers() -> Case:
    grad = torch.complex(random_grad(4, 3), random_grad(4, 3, seed=1))
    return Case(
        [plain_param(grad), dtensor_param(random_grad(8, 2), world_mesh("dp"), [Shard(0)])],
        [grad, random_grad(8, 2)],
        all_reduces=_one_if_distributed(),
    )


@row(1, 2, 4, why="nn.Embedding(sparse=True): rows that were not coalesced and must be added first")
def sparse() -> Case:
    embedding = nn.Embedding(10, 4, sparse=True)
    nn.init.ones_(embedding.weight)
    (embedding(torch.tensor([1, 3, 3, 7])) * torch.arange(16.0).view(4, 4)).sum().backward()
    other = random_grad(8, 2)
    assert embedding.weight.grad is not None
    return Case(
        [embedding.weight, dtensor_param(other, world_mesh("dp"), [Shard(0)])],
        [embedding.weight.grad.to_dense(), other],
        all_reduces=_one_if_distributed(),
    )


@row(1, 2, 4, why="a parameter listed twice counts once and is scaled once")
def listed_twice() -> Case:
    case = sharded(random_grad(8, 3), random_grad(5, 2, seed=1))
    case.parameters += case.parameters
    case.all_reduces = _one_if_distributed()
    return case


@row(1, 2, 4, why="a generator, which can be read once only")
def generator() -> Case:
    case = sharded(random_grad(8, 3), random_grad(5, 2, seed=1))
    case.parameters = (p for p in list(case.parameters))
    case.all_reduces = _one_if_distributed()
    return case


@row(1, 2, 4, why="one tensor instead of a list")
def one_tensor() -> Case:
    case = sharded(random_grad(8, 3))
    case.parameters, case.all_reduces = case.parameters[0], _one_if_distributed()
    return case


@row(1, 2, 4, why="an empty list")
def nothing() -> Case:
    return Case([], [], all_reduces=0)


@row(2, 4, why="dense memory in another order, strided views, and a DTensor replicated on all ranks")
def strides() -> Case:
    grads = [random_grad(2, 3, 4, 5), random_grad(6, 8, seed=1), random_grad(5, seed=2)]
    channels = plain_param(grads[0])
    channels.grad = grads[0].contiguous(memory_format=torch.channels_last)
    strided = nn.Parameter(torch.zeros(6, 8))
    strided.grad = torch.zeros(12, 16)[::2, ::2].copy_(grads[1])
    return Case([channels, strided, dtensor_param(grads[2], world_mesh("dp"), [Replicate()])], grads)


def _one_if_distributed() -> int:
    return int(dist.get_world_size() > 1)
