"""A function that spans more ranks than an earlier call with the same axes begins over those of the earlier one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from tests.ranks import gather_from_ranks, on_ranks
from tests.tables.layouts.meshes import world_mesh


@on_ranks(4)
def test_wider_calls_gather_only_if_the_meshes_have_changed() -> None:
    mesh = world_mesh("pp", "dp")
    stage, gathers = dist.get_rank() // 2, []
    plain, sharded = (
        nn.Parameter(torch.zeros(4)),
        nn.Parameter(distribute_tensor(torch.zeros(4), mesh["dp"], [Shard(0)], src_data_rank=None)),
    )
    plain.grad = torch.full((4,), 1.0 + stage)
    sharded.grad = distribute_tensor(torch.full((4,), 2.0 + stage), mesh["dp"], [Shard(0)], src_data_rank=None)
    gather = dist.all_gather_object

    def norm(params: list[nn.Parameter]) -> float:
        gathers.clear()
        with mock.patch.object(dist, "all_gather_object", lambda *a, **k: gathers.append(1) or gather(*a, **k)):
            found = float(distclip.clip_grad_norm_(params, 1e3, split_over={"pp": mesh["pp"]}))
        assert len(set(gather_from_ranks(found))) == 1
        return found

    for is_first in (True, False, False):
        assert norm([plain]) == pytest.approx((4 + 16) ** 0.5)
        assert not gathers
        assert norm([plain, sharded]) == pytest.approx((4 + 16 + 16 + 36) ** 0.5)
        assert bool(gathers) == is_first
    # One stage has no shards this time. The other ranks cannot know.
    assert norm([plain, sharded] if stage else [plain]) == pytest.approx((4 + 16 + 36) ** 0.5)
    assert gathers
