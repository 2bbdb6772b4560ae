"""What cannot be meant is refused by all ranks together, before any gradient is touched, and the world lives on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
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
from tests.ranks import World
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.model_parallel import axis, known, made
from tests.tables.layouts.pipeline import plain
from tests.tables.layouts.tagged import tagged


def refused(call: Callable[[], Any], kind: type[Exception], *words: str, touched: Tensor | None = None) -> None:
    """`call` raises `kind` on every rank and leaves the gradient alone."""
    before = None if touched is None else touched.clone()
    try:
        call()
    except Exception as error:
        assert isinstance(error, kind), f"{type(error).__name__}: {error}"
        for word in words:
            assert word in str(error), f"{word!r} is not in: {error}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised on rank {dist.get_rank()}")
    if touched is not None:
        assert before is not None
        assert torch.equal(before.nan_to_num(), touched.nan_to_num()), "a gradient was touched"
    dist.barrier()


def stage_parameter() -> tuple[nn.Parameter, Any]:
    mesh = axis("pp", "dp")
    return made(known(6, 4), mesh["dp"], [Shard(0)]), mesh


def check_arguments(only: int | None, first: bool) -> None:
    """`only`: the one rank that passes the wrong thing, None for all; `first`: in the first call with the mesh."""
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
        refused(clip(**wrong), ArgumentError, word, touched=local)
    distclip.clip_grad_norm_([param], 1.0, split_over=mesh["pp"])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("only", [None, 2])
def test_arguments(world: Callable[[int], World], only: int | None, first: bool) -> None:
    world(4).run(check_arguments, only=only, first=first)


def check_disagreement() -> None:
    param, mesh = stage_parameter()
    rank = dist.get_rank()
    local = param.grad.to_local()
    for split_over in (
        mesh["pp"] if rank != 1 else None,
        mesh["pp"] if rank != 2 else mesh["dp"],
        {"pp": mesh["pp"]} if rank != 3 else {"stages": mesh["pp"]},
        {0: mesh["pp"], 1: mesh["dp"], 2: None, 3: mesh}[rank],
    ):
        refused(
            lambda split_over=split_over: distclip.clip_grad_norm_([param], 1.0, split_over=split_over),
            DisagreementError,
            "split_over=",
            touched=local,
        )
        refused(
            lambda split_over=split_over: GradClipper([param], distclip.global_norm(), split_over=split_over),
            DisagreementError,
            "split_over=",
        )
    distclip.clip_grad_norm_([param], 1.0, split_over=mesh["pp"])


def test_disagreement(world: Callable[[int], World]) -> None:
    world(4).run(check_disagreement)


def check_layouts() -> None:
    rank = dist.get_rank()
    model = FullyShardedDataParallel(mlp(5, 7, 3), device_id=torch.device("cpu"), use_orig_params=True)
    backward(model, 5)
    for bare in (model.parameters(), model.named_parameters(), next(iter(model.parameters()))):
        refused(lambda bare=bare: distclip.clip_grad_norm_(bare, 1.0), LayoutError, "FSDP1", "parameters=model")
    other = dist.DeviceMesh("cpu", [0, 1] if rank >= 2 else [2, 3], _init_backend=False)
    refused(
        lambda: distclip.clip_grad_norm_([plain(known(3))], 1.0, split_over=other), ArgumentError, "split_over=", "rank"
    )
    refused(
        lambda: distclip.annotate_(plain(known(3)), other, [Shard(0)]), LayoutError, "does not" if 0 else "not rank"
    )
    refused(lambda: distclip.clip_grad_norm_([plain(known(3))], 1.0, split_over=7), ArgumentError, "split_over=7")
    shard = tagged(known(3, 4), tensor_model_parallel=True)
    refused(lambda: distclip.clip_grad_norm_([shard], 1.0), LayoutError, 'split_over={"tp"')
    mesh = axis("pp", "tp")
    unnamed = (
        [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2],
        [
            dist.new_group([0, 1]),
            dist.new_group([2, 3]),
        ][rank // 2],
    )
    refused(lambda: distclip.clip_grad_norm_([shard], 1.0, split_over=unnamed), ArgumentError, "Name them")
    refused(lambda: distclip.annotate_(shard, mesh["tp"], []), ArgumentError, "placements=[]")


def test_layouts(world: Callable[[int], World]) -> None:
    world(4).run(check_layouts)


def check_nonfinite(value: float, norm_type: float) -> None:
    """A bad element on one stage of two."""
    param, mesh = stage_parameter()
    local = param.grad.to_local()
    if dist.get_rank() == 3:
        local[0, 0] = value
    for _ in range(2):
        refused(
            lambda: distclip.clip_grad_norm_([param], 1.0, norm_type, error_if_nonfinite=True, split_over=mesh["pp"]),
            NonFiniteError,
            f"The total norm of order {norm_type} for gradients",
            touched=local,
        )
    norm = distclip.clip_grad_norm_([param], float("inf"), norm_type, split_over=mesh["pp"])
    assert not norm.isfinite()
    assert norm.isnan() == (value != value)
    assert local.isfinite().sum() == local.numel() - (dist.get_rank() == 3), "max_norm=inf wrote"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_nonfinite(world: Callable[[int], World], value: float, norm_type: float) -> None:
    world(4).run(check_nonfinite, value=value, norm_type=norm_type)


def check_failure_while_measuring() -> None:
    """One rank's gradient cannot be measured at all; the others hear of it in the reduction."""
    param, mesh = stage_parameter()
    distclip.clip_grad_norm_([param], float("inf"), split_over=mesh["pp"])
    odd = plain(known(3))
    clipper = GradClipper([("even", param), ("odd", odd)], distclip.value(1.0), split_over=mesh["pp"])
    clipper.clip()
    if dist.get_rank() == 1:
        odd.grad, odd.main_grad = None, torch.complex(known(3), known(3))
    refused(clipper.clip, DistclipError, "odd", "complex", touched=param.grad.to_local())


def test_failure_while_measuring(world: Callable[[int], World]) -> None:
    world(4).run(check_failure_while_measuring)


def check_wider_later() -> None:
    """Plain stages first; then, over the same axis, parameters whose mesh reaches other pipelines."""
    mesh = axis("pp", "dp")
    stage, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    mine = plain(torch.full((2,), float(1 + stage + 2 * replica)))
    norm = distclip.clip_grad_norm_([mine], float("inf"), split_over=mesh["pp"])
    expected = [(1.0, 2.0), (3.0, 4.0)][replica]
    torch.testing.assert_close(float(norm), (2 * (expected[0] ** 2 + expected[1] ** 2)) ** 0.5)
    grads = [known(6, 4, seed=s) for s in range(2)]
    param = made(grads[stage], mesh["dp"], [Shard(0)])
    parameters = [] if dist.get_rank() == 2 else [param]
    expected_norm = reference.total_norm([grads[0], grads[1][3:]])
    for _ in range(2):
        norm = distclip.clip_grad_norm_(parameters, float("inf"), split_over=mesh["pp"])
        torch.testing.assert_close(norm.double(), expected_norm, rtol=1e-6, atol=0)


def test_wider_later(world: Callable[[int], World]) -> None:
    world(4).run(check_wider_later)


def check_optimizers(only: int | None) -> None:
    param, mesh = stage_parameter()
    clipper = GradClipper([("weight", param)], distclip.global_norm(1.0), split_over=mesh["pp"])
    optimizer = torch.optim.SGD([param], lr=0.1)
    if only is not None:
        clipper.step(optimizer)  # whom a rank passes that fails, the others have met
    weights = param.to_local().clone()
    for wrong in (3, None, param, [optimizer, "sgd"]):
        passed: Any = wrong if only in (None, dist.get_rank()) else optimizer
        refused(
            lambda passed=passed: clipper.step(passed),
            ArgumentError,
            "optimizer=",
            "expected a torch.optim.Optimizer",
            touched=param.grad.to_local(),
        )
        assert torch.equal(param.to_local(), weights)
    clipper.step([optimizer] if dist.get_rank() % 2 else optimizer)


@pytest.mark.parametrize("only", [None, 2])
def test_optimizers(world: Callable[[int], World], only: int | None) -> None:
    world(4).run(check_optimizers, only=only)
