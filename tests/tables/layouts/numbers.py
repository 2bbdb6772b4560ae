"""Numbers that squares, sums and narrow dtypes cannot hold, spread over ranks; and odd things to pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from tests.tables.layouts import Case, row
from tests.tables.layouts.model_parallel import axis, known, made
from tests.tables.layouts.pipeline import plain

EVEN = (2.0, 1.0, float("inf"))


def sharded(*grads: Tensor) -> Case:
    """Each gradient sharded over the world."""
    mesh = axis("fsdp")
    return Case([made(g, mesh, [Shard(0)]) for g in grads], list(grads))


@row(2, 4, why="float32, bfloat16 and float16 gradients in one call")
def mixed_dtypes() -> Case:
    return sharded(known(8, 3), known(9, 5, seed=1).bfloat16(), known(7, seed=2).half())


@row(2, 4, why="fp16 elements of 3000: torch squares them in fp16, gets inf and zeroes every gradient")
def fp16_large() -> Case:
    return sharded(torch.full((40, 30), 3000.0, dtype=torch.float16))


@row(2, 4, why="float32 of 1e25: the square does not fit into float32, and the sum of cubes hardly into float64")
def fp32_huge() -> Case:
    return sharded(known(8, 3) * 1e25)


@row(2, 4, why="a norm that float32 cannot hold, of elements that it can", norms=(2.0, 1.0))
def fp32_norm_beyond_fp32() -> Case:
    return sharded(torch.full((64, 64), 3e38))


@row(2, 4, why="float32 of 1e-25: the square underflows in float32 and torch reports 0")
def fp32_tiny() -> Case:
    return sharded(known(8, 3) * 1e-25)


@row(2, 4, why="float64 that float32 cannot hold is no error", norms=EVEN)
def fp64_huge() -> Case:
    case = sharded(known(8, 3).double() * 1e100)
    case.tolerance = 1e-12
    return case


@row(1, 2, 4, why="complex gradients: |z|, not its parts", norms=(2.0, 1.0, 3.0, float("inf")))
def complex_numbers() -> Case:
    grad = torch.complex(known(4, 3), known(4, 3, seed=1))
    return Case([plain(grad), made(known(8, 2), axis("dp"), [Shard(0)])], [grad, known(8, 2)], all_reduces=_some())


@row(1, 2, 4, why="nn.Embedding(sparse=True): uncoalesced rows that belong together")
def sparse() -> Case:
    embedding = nn.Embedding(10, 4, sparse=True)
    nn.init.ones_(embedding.weight)
    (embedding(torch.tensor([1, 3, 3, 7])) * torch.arange(16.0).view(4, 4)).sum().backward()
    other = known(8, 2)
    assert embedding.weight.grad is not None
    return Case(
        [embedding.weight, made(other, axis("dp"), [Shard(0)])],
        [embedding.weight.grad.to_dense(), other],
        all_reduces=_some(),
    )


@row(1, 2, 4, why="a parameter listed twice counts and is scaled once")
def listed_twice() -> Case:
    case = sharded(known(8, 3), known(5, 2, seed=1))
    case.parameters += case.parameters
    case.all_reduces = _some()
    return case


@row(1, 2, 4, why="a generator, which can be read once only")
def generator() -> Case:
    case = sharded(known(8, 3), known(5, 2, seed=1))
    case.parameters = (p for p in list(case.parameters))
    case.all_reduces = _some()
    return case


@row(1, 2, 4, why="one tensor instead of a list")
def one_tensor() -> Case:
    case = sharded(known(8, 3))
    case.parameters, case.all_reduces = case.parameters[0], _some()
    return case


@row(1, 2, 4, why="nothing at all")
def nothing() -> Case:
    return Case([], [], all_reduces=0)


@row(2, 4, why="dense memory in another order, strided views, and a DTensor replicated everywhere")
def strides() -> Case:
    grads = [known(2, 3, 4, 5), known(6, 8, seed=1), known(5, seed=2)]
    channels = plain(grads[0])
    channels.grad = grads[0].contiguous(memory_format=torch.channels_last)
    strided = nn.Parameter(torch.zeros(6, 8))
    strided.grad = torch.zeros(12, 16)[::2, ::2].copy_(grads[1])
    return Case([channels, strided, made(grads[2], axis("dp"), [Replicate()])], grads)


def _some() -> int:
    return int(dist.get_world_size() > 1)
