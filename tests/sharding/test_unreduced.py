"""Read gradients while FSDP has them elsewhere, whole or not reduced yet: refused, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

import distclip
from distclip import GradClipper, LayoutError
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import world_mesh


def measures(model: nn.Module) -> list[Callable[[], Any]]:
    """Return the calls that read the gradients of a model."""
    clipper = GradClipper(model, distclip.global_norm(1.0))
    return [
        clipper.clip,
        lambda: distclip.clip_grad_norm_(model, 1.0),
        lambda: GradClipper(
            model, distclip.per_tensor_norm(1.0) if isinstance(model, FSDPModule) else distclip.global_norm(1.0)
        ).clip(),
    ]


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_with_whole_parameters_or_gradients(use_orig_params: bool) -> None:
    model = FullyShardedDataParallel(mlp(5, 7, 3), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    calls = measures(model)
    backward(model, 5)
    norm = float(calls[1]())
    summon: Callable[..., AbstractContextManager[Any]] = FullyShardedDataParallel.summon_full_params
    for options in ({}, {"with_grads": True} if use_orig_params else {"writeback": False}):
        with summon(model, **options):
            for call in calls:
                assert_raises_on_ranks(call, LayoutError, "summon_full_params")
    model.zero_grad()
    with model.no_sync():
        backward(model, 5)
    for call in calls:
        assert_raises_on_ranks(call, LayoutError, "no_sync")
    backward(model, 5)
    assert float(calls[1]()) > 0
    assert norm > 0


@on_ranks(2)
def test_fsdp1_without_sharding() -> None:
    model = FullyShardedDataParallel(
        mlp(5, 7, 3),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        sharding_strategy=torch.distributed.fsdp.ShardingStrategy.NO_SHARD,
    )
    backward(model, 5)
    with FullyShardedDataParallel.summon_full_params(model):
        assert float(distclip.clip_grad_norm_(model, 1.0)) > 0


@on_ranks(4)
@pytest.mark.parametrize("switch", ["set_requires_gradient_sync", "set_requires_all_reduce"])
@pytest.mark.parametrize("pass_module", [True, False])
def test_fsdp2_without_synchronization(switch: str, pass_module: bool) -> None:
    model = mlp(5, 7, 3)
    mesh = world_mesh("replicate", "shard")
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = model if pass_module else dict(model.named_parameters()).items()
    clipper = GradClipper(parameters, distclip.global_norm(1.0))
    for accumulate in (False, True):
        model.zero_grad()
        getattr(model, switch)(False)
        # Without gradients there is nothing to wait for.
        clipper.clip()
        backward(model, 5)
        assert_raises_on_ranks(clipper.clip, LayoutError, "set_requires_gradient_sync(True)")
        if not accumulate:
            with torch.no_grad():
                assert_raises_on_ranks(
                    lambda: distclip.clip_grad_norm_([p for _, p in model.named_parameters()], 1.0),
                    LayoutError,
                    "FSDP2",
                )
        getattr(model, switch)(True)
        backward(model, 5)
        assert float(clipper.clip().norm) > 0
