"""Pass invalid arguments: all ranks raise together before any gradient is written, and the world can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard

import distclip
from distclip import (
    ArgumentError,
    DisagreementError,
    DistclipError,
    GradClipper,
    LayoutError,
    NonFiniteError,
    reference,
)
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import group_of, world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad, tagged_param


def stage_parameter() -> tuple[nn.Parameter, Any]:
    """Make a parameter that is sharded within each of two stages, and the mesh."""
    mesh = world_mesh("pp", "dp")
    return dtensor_param(random_grad(6, 4), mesh["dp"], [Shard(0)]), mesh


@on_ranks(4)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("only", [None, 2])
def test_invalid_arguments_raise_on_all_ranks(only: int | None, first: bool) -> None:
    """Pass invalid arguments on one rank or on all, in the first call with the mesh or in a later one."""
    param, mesh = stage_parameter()
    here = only is None or dist.get_rank() == only
    local = param.grad.to_local()
    if not first:
        distclip.clip_grad_norm_([param], float("inf"), split_over=mesh["pp"])

    def clip(**wrong: Any) -> Callable[[], Any]:
        passed = {"max_norm": 1.0, "split_over": mesh["pp"], **(wrong if here else {})}
        parameters = passed.pop("parameters", [param])
        return lambda: distclip.clip_grad_norm_(parameters, **passed)

    for wrong, word in [
        ({"max_norm": -1.0}, "max_norm=-1.0"),
        ({"max_norm": float("nan")}, "max_norm=nan"),
        ({"norm_type": "two"}, "norm_type='two'"),
        ({"norm_type": float("nan")}, "norm_type=nan"),
        ({"parameters": 3}, "parameters=3"),
        ({"parameters": [param, "weight"]}, "parameters[1]"),
    ]:
        assert_raises_on_ranks(clip(**wrong), ArgumentError, word, unchanged=local)
    distclip.clip_grad_norm_([param], 1.0, split_over=mesh["pp"])


@on_ranks(4)
@pytest.mark.parametrize("only", [None, 2])
def test_text_in_place_of_a_flag_raises_on_all_ranks(only: int | None) -> None:
    """Pass text such as "no", which counts as true, on one rank or on all."""
    param, mesh = stage_parameter()
    text: Any = "no" if only in (None, dist.get_rank()) else False
    for flag in ("partial", "flat_grads", "isolate"):
        assert_raises_on_ranks(
            lambda flag=flag: GradClipper([param], distclip.global_norm(), split_over=mesh["pp"], **{flag: text}),
            ArgumentError,
            f"{flag}='no': text is not a flag",
        )
    assert_raises_on_ranks(
        lambda: distclip.clip_grad_norm_([param], 1.0, error_if_nonfinite=text, split_over=mesh["pp"]),
        ArgumentError,
        "error_if_nonfinite='no'",
        unchanged=param.grad.to_local(),
    )


@on_ranks(4)
def test_different_split_over_raises_on_all_ranks() -> None:
    param, mesh = stage_parameter()
    rank = dist.get_rank()
    local = param.grad.to_local()
    for split_over in (
        mesh["pp"] if rank != 1 else None,
        mesh["pp"] if rank != 2 else mesh["dp"],
        {"pp": mesh["pp"]} if rank != 3 else {"stages": mesh["pp"]},
        {0: mesh["pp"], 1: mesh["dp"], 2: None, 3: mesh}[rank],
    ):
        assert_raises_on_ranks(
            lambda split_over=split_over: distclip.clip_grad_norm_([param], 1.0, split_over=split_over),
            DisagreementError,
            "split_over=",
            unchanged=local,
        )
        assert_raises_on_ranks(
            lambda split_over=split_over: GradClipper([param], distclip.global_norm(), split_over=split_over),
            DisagreementError,
            "split_over=",
        )
    distclip.clip_grad_norm_([param], 1.0, split_over=mesh["pp"])


@on_ranks(4)
def test_unknown_or_contradictory_layouts_raise() -> None:
    rank = dist.get_rank()
    model = FullyShardedDataParallel(mlp(5, 7, 3), device_id=torch.device("cpu"), use_orig_params=True)
    backward(model, 5)
    for bare in (model.parameters(), model.named_parameters(), next(iter(model.parameters()))):
        assert_raises_on_ranks(
            lambda bare=bare: distclip.clip_grad_norm_(bare, 1.0), LayoutError, "FSDP1", "parameters=model"
        )
    other = dist.DeviceMesh("cpu", [0, 1] if rank >= 2 else [2, 3], _init_backend=False)
    assert_raises_on_ranks(
        lambda: distclip.clip_grad_norm_([plain_param(random_grad(3))], 1.0, split_over=other),
        ArgumentError,
        "split_over=",
        "rank",
    )
    assert_raises_on_ranks(
        lambda: distclip.annotate_(plain_param(random_grad(3)), other, [Shard(0)]),
        LayoutError,
        "not rank",
    )
    assert_raises_on_ranks(
        lambda: distclip.clip_grad_norm_([plain_param(random_grad(3))], 1.0, split_over=7),
        ArgumentError,
        "split_over=7",
    )
    shard = tagged_param(random_grad(3, 4), tensor_model_parallel=True)
    assert_raises_on_ranks(lambda: distclip.clip_grad_norm_([shard], 1.0), LayoutError, 'split_over={"tp"')
    mesh = world_mesh("pp", "tp")
    unnamed = ([group_of(0, 2), group_of(1, 3)][rank % 2], [group_of(0, 1), group_of(2, 3)][rank // 2])
    assert_raises_on_ranks(
        lambda: distclip.clip_grad_norm_([shard], 1.0, split_over=unnamed), ArgumentError, "Use names"
    )
    assert_raises_on_ranks(lambda: distclip.annotate_(shard, mesh["tp"], []), ArgumentError, "placements=[]")


@on_ranks(4)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_error_if_nonfinite_raises_on_all_ranks(value: float, norm_type: float) -> None:
    """Write a non-finite element on one of two stages."""
    param, mesh = stage_parameter()
    local = param.grad.to_local()
    if dist.get_rank() == 3:
        local[0, 0] = value
    for _ in range(2):
        assert_raises_on_ranks(
            lambda: distclip.clip_grad_norm_([param], 1.0, norm_type, error_if_nonfinite=True, split_over=mesh["pp"]),
            NonFiniteError,
            f"The total norm of order {norm_type} for gradients",
            unchanged=local,
        )
    norm = distclip.clip_grad_norm_([param], float("inf"), norm_type, split_over=mesh["pp"])
    assert not norm.isfinite()
    assert norm.isnan() == (value != value)
    assert local.isfinite().sum() == local.numel() - (dist.get_rank() == 3), "max_norm=inf wrote"


@on_ranks(4)
def test_gradient_that_cannot_be_measured_raises_on_all_ranks() -> None:
    param, mesh = stage_parameter()
    distclip.clip_grad_norm_([param], float("inf"), split_over=mesh["pp"])
    odd = plain_param(random_grad(3))
    clipper = GradClipper([("even", param), ("odd", odd)], distclip.value(1.0), split_over=mesh["pp"])
    clipper.clip()
    if dist.get_rank() == 1:
        odd.grad, odd.main_grad = None, torch.complex(random_grad(3), random_grad(3))
    assert_raises_on_ranks(clipper.clip, DistclipError, "odd", "complex", unchanged=param.grad.to_local())


@on_ranks(4)
def test_wider_meshes_in_a_later_call_over_the_same_axis() -> None:
    """Clip plain stages, then parameters over the same axis whose mesh has ranks of other pipelines."""
    mesh = world_mesh("pp", "dp")
    stage, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    local = plain_param(torch.full((2,), float(1 + stage + 2 * replica)))
    norm = distclip.clip_grad_norm_([local], float("inf"), split_over=mesh["pp"])
    expected = [(1.0, 2.0), (3.0, 4.0)][replica]
    torch.testing.assert_close(float(norm), (2 * (expected[0] ** 2 + expected[1] ** 2)) ** 0.5)
    grads = [random_grad(6, 4, seed=s) for s in range(2)]
    param = dtensor_param(grads[stage], mesh["dp"], [Shard(0)])
    parameters = [] if dist.get_rank() == 2 else [param]
    expected_norm = reference.total_norm([grads[0], grads[1][3:]])
    for _ in range(2):
        norm = distclip.clip_grad_norm_(parameters, float("inf"), split_over=mesh["pp"])
        torch.testing.assert_close(norm.double(), expected_norm, rtol=1e-6, atol=0)


@on_ranks(4)
@pytest.mark.parametrize("only", [None, 2])
def test_invalid_optimizers_raise_on_all_ranks(only: int | None) -> None:
    param, mesh = stage_parameter()
    clipper = GradClipper([("weight", param)], distclip.global_norm(1.0), split_over=mesh["pp"])
    optimizer = torch.optim.SGD([param], lr=0.1)
    if only is not None:
        # The first call with an optimizer compares ranks, a later one does not.
        clipper.step(optimizer)
    weights = param.to_local().clone()
    no_optimizer = "not a torch.optim.Optimizer"
    for wrong, text in (
        (3, no_optimizer),
        (None, no_optimizer),
        (param, no_optimizer),
        ([optimizer, "sgd"], no_optimizer),
        ([optimizer, optimizer], "one optimizer twice"),
    ):
        passed: Any = wrong if only in (None, dist.get_rank()) else optimizer
        assert_raises_on_ranks(
            lambda passed=passed: clipper.step(passed),
            ArgumentError,
            "optimizer",
            text,
            unchanged=param.grad.to_local(),
        )
        assert torch.equal(param.to_local(), weights)
    clipper.step([optimizer] if dist.get_rank() % 2 else optimizer)
