"""One line about a clipper's layout."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper
from tests.ranks import on_ranks
from tests.tables.layouts.meshes import world_mesh


def describe(model: nn.Module, **options: object) -> str:
    return GradClipper(model, distclip.global_norm(1.0), **options).describe()  # type: ignore[arg-type]


@on_ranks(4)
def test_layouts_in_one_line() -> None:
    mesh, policy = world_mesh("dp", "tp"), "global_norm(1.0): "
    sharded = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    fully_shard(sharded[0], mesh=mesh["dp"])
    two, plain = "1 tensor, 2 shards each", "2 plain tensors"
    assert describe(sharded) == f"{policy}{two}; {plain}, assumed to be replicas; one all-reduce over 2 ranks"
    stages = f"{policy}{two}; {plain}, different ones along tp; split over tp; one all-reduce over 4 ranks"
    assert describe(sharded, split_over=mesh["tp"]) == stages
    hybrid = nn.Linear(4, 4)
    fully_shard(hybrid, mesh=mesh)
    shards = "2 tensors, 2 shards each and 2 replicas of each shard"
    assert describe(hybrid) == f"{policy}{shards}; one all-reduce over 4 ranks"
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    assert describe(ddp) == f"{policy}2 tensors, averaged by DDP over 4 ranks; one all-reduce over 4 ranks"
    assert repr(GradClipper(ddp, distclip.global_norm(1.0))) == f"GradClipper({describe(ddp)})"


def test_one_process() -> None:
    one = nn.Parameter(torch.zeros(2))
    assert describe([("w", one)]) == "global_norm(1.0): 1 tensor; no communication"  # type: ignore[arg-type]
