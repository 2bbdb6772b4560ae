"""Enter DDP, FSDP2, HSDP and FSDP1 into the table of layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tests.tables.layouts import Case, row
from tests.tables.layouts.meshes import group_of, mesh_of, world_mesh
from tests.tables.layouts.tensors import full_grads


def mlp(*dims: int) -> nn.Sequential:
    """Make linear layers with tanh between them, the same on every rank."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(dims, dims[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers)


def backward(model: nn.Module, inputs: int, dtype: torch.dtype = torch.float32) -> None:
    """Run backward on a batch of this rank, with gradients of about 1."""
    torch.manual_seed(100 + dist.get_rank())
    (model(torch.randn(6, inputs, dtype=dtype)) * 30).square().sum().backward()


def _ddp(**options: Any) -> Case:
    model = DistributedDataParallel(mlp(5, 7, 3), **options)
    backward(model, 5)
    return Case(model.parameters(), full_grads(model.parameters()), all_reduces=0)


@row(1, 2, 4, why="the common case: replicas, nothing to reduce; a gradient must not count once per rank")
def ddp() -> Case:
    return _ddp()


@row(2, 4, why="gradients are views of buckets: scaling one must not touch another")
def ddp_bucket_view() -> Case:
    return _ddp(gradient_as_bucket_view=True)


@row(2, 4, why="a static graph delays its all-reduce to the end of backward")
def ddp_static_graph() -> Case:
    return _ddp(static_graph=True)


class _Branches(nn.Module):
    """Use `even` or `odd`, depending on the rank, and never `never`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.odd, self.never = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.even(x) if dist.get_rank() % 2 == 0 else self.odd(x)


@row(
    2,
    4,
    why="parameters that only some ranks, or none, used; the wrapped module is passed",
)
def ddp_unused() -> Case:
    model = DistributedDataParallel(_Branches(), find_unused_parameters=True)
    backward(model, 5)
    return Case(model, full_grads(model.parameters()), all_reduces=0, all_reduces_of_clipper=1)


@row(2, why="gradient accumulation: a step under no_sync, then one that synchronizes both")
def ddp_accumulated() -> Case:
    model = DistributedDataParallel(mlp(5, 7, 3))
    with model.no_sync():
        backward(model, 5)
    backward(model, 5)
    return Case(model.parameters(), full_grads(model.parameters()), all_reduces=0)


def _fsdp2(model: nn.Sequential, inputs: int, mesh_shape: tuple[int, ...] = (), **options: Any) -> Case:
    if mesh_shape:
        options["mesh"] = world_mesh("replicate", "shard", shape=mesh_shape)
    dtype = next(model.parameters()).dtype
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    backward(model, inputs, dtype)
    return Case(model.parameters(), full_grads(model.parameters()))


@row(2, 4, why="FSDP2, every shard of the same size")
def fsdp2() -> Case:
    return _fsdp2(mlp(8, 16, 8), 8)


@row(2, 4, why="rows that do not divide by the ranks: ragged shards")
def fsdp2_ragged() -> Case:
    return _fsdp2(mlp(5, 7, 3), 5)


@row(2, 4, why="fewer rows than ranks: some shards are empty (torch's inf-norm raises there and hangs on other ranks)")
def fsdp2_empty() -> Case:
    return _fsdp2(mlp(4, 1, 2), 4)


@row(2, 4, why="units within units")
def fsdp2_nested() -> Case:
    model = nn.Sequential(mlp(8, 6, 4), mlp(4, 6, 2))
    for inner in model:
        fully_shard(inner)
    fully_shard(model)
    backward(model, 8)
    return Case(model, full_grads(model.parameters()))


@row(2, 4, why="bf16 parameters in the forward, fp32 reduction: fp32 shards")
def fsdp2_mixed_precision() -> Case:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    return _fsdp2(mlp(8, 16, 8), 8, mp_policy=policy)


@row(2, 4, why="bf16 gradients: torch returns a norm rounded to bf16, with an error of 2e-3")
def fsdp2_bf16() -> Case:
    return _fsdp2(mlp(8, 16, 8).bfloat16(), 8)


@row(2, 4, why="float64 must stay float64")
def fsdp2_fp64() -> Case:
    case = _fsdp2(mlp(8, 16, 8).double(), 8)
    case.tolerance = 1e-12
    return case


@row(2, 4, why="one unit never ran: none of its parameters has a gradient")
def fsdp2_unused() -> Case:
    model = mlp(8, 16, 8)
    model.append(nn.Linear(8, 8))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    backward(model[:-1], 8)
    return Case(model.parameters(), full_grads(model.parameters()))


@row(2, 4, why="one rank has fewer gradients: torch's vector of norms is shorter there, and all ranks hang")
def fsdp2_one_rank_without() -> Case:
    case = _fsdp2(mlp(8, 16, 8), 8)
    parameters = list(case.parameters)
    last = dist.get_world_size() - 1
    assert parameters[0].grad.placements[0].is_shard()
    rows = case.whole[0].chunk(dist.get_world_size())[last]
    case.whole[0] = torch.cat([case.whole[0][: -rows.shape[0]], torch.zeros_like(rows)])
    if dist.get_rank() == last:
        parameters[0].grad = None
    case.parameters = parameters
    return case


@row(2, 4, why="shards within a node, replicas across nodes: a replicated shard counts once")
def hsdp() -> Case:
    return _fsdp2(mlp(5, 7, 3), 5, (2, dist.get_world_size() // 2))


def _fsdp1(strategy: ShardingStrategy, use_orig_params: bool) -> Case:
    reference = DistributedDataParallel(mlp(5, 7, 3, 1))
    backward(reference, 5)
    options: dict[str, Any] = {"sharding_strategy": strategy, "use_orig_params": use_orig_params}
    if strategy is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = world_mesh("replicate", "shard")
    model = FullyShardedDataParallel(
        mlp(5, 7, 3, 1), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), device_id=torch.device("cpu"), **options
    )
    backward(model, 5)
    all_reduces = 0 if strategy is ShardingStrategy.NO_SHARD else 1
    return Case(model, full_grads(reference.parameters()), all_reduces=all_reduces, tolerance=2e-6)


def _enter_fsdp1() -> None:
    why = {
        ShardingStrategy.FULL_SHARD: "1-D slices whose positions only the module knows",
        ShardingStrategy.SHARD_GRAD_OP: "gradients sharded, parameters not",
        ShardingStrategy.HYBRID_SHARD: "slices within a node, replicas across nodes",
        ShardingStrategy.NO_SHARD: "replicas, as in DDP",
    }
    for strategy, reason in why.items():
        for use_orig_params in (False, True):

            def build(strategy: ShardingStrategy = strategy, use_orig_params: bool = use_orig_params) -> Case:
                return _fsdp1(strategy, use_orig_params)

            build.__name__ = f"fsdp1_{strategy.name.lower()}{'_orig' if use_orig_params else ''}"
            worlds = (4,) if strategy is ShardingStrategy.HYBRID_SHARD else (2, 4)
            row(*worlds, why=reason)(build)


_enter_fsdp1()


@row(2, 4, why="FSDP2 that shards columns, and ignores one parameter, which stays plain")
def fsdp2_columns_and_ignored() -> Case:
    model = mlp(8, 16, 8)
    kept = model[2].bias
    fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1), ignored_params={kept})
    backward(model, 8)
    dist.all_reduce(kept.grad)
    return Case(model.parameters(), full_grads(model.parameters()))


@row(4, why="a model on two of four ranks, neither of them the first")
def fsdp2_inner_ranks() -> Case:
    mesh = mesh_of(1, 2)
    ranks = group_of(1, 2)
    if dist.get_rank() in (0, 3):
        return Case([], [], idle=True)
    return dataclasses.replace(_fsdp2(mlp(8, 16, 8), 8, mesh=mesh), ranks=ranks)
