"""Bind a clipper to other tensors, and write a decision into copies of gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD

from distclip import (
    ArgumentError,
    DisagreementError,
    GradClipper,
    LayoutError,
    adagc,
    agc,
    global_norm,
    per_tensor_norm,
    value,
    zclip,
)
from distclip.extend import FirstError
from distclip.monitor import Recorder
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import world_mesh


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def fill_with_ones(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.ones_like(param)


def fill(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in module.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * (1 + step)


@pytest.mark.parametrize("policy", [zclip(warmup=2), adagc(warmup=2)], ids=["model", "tensor"])
def test_rebinding_keeps_the_state(policy: object) -> None:
    one, other = make_model(), make_model()
    original, rebound = GradClipper(one, policy), GradClipper(one, policy)  # type: ignore[arg-type]
    for step in range(4):
        for clipper in (original, rebound):
            fill(one, step)
            clipper.clip()
    rebound.rebind(list(reversed(list(other.named_parameters()))))
    fill(one, 4)
    fill(other, 4)
    expected, report = original.clip(), rebound.clip()
    assert report.as_dict() == pytest.approx(expected.as_dict())
    assert dict(zip(rebound.slots, report.coefs.tolist(), strict=True)) == pytest.approx(
        dict(zip(original.slots, expected.coefs.tolist(), strict=True))
    )
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_rebinding_to_an_invalid_argument_raises() -> None:
    with pytest.raises(ArgumentError, match="expected a torch"):
        GradClipper(make_model(), global_norm(1.0)).rebind(3)  # type: ignore[arg-type]


def test_objects_in_messages_are_short_and_on_one_line() -> None:
    """The `repr` of an optimizer or a model has many lines."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    calls: list[Callable[[], object]] = [
        lambda: GradClipper(optimizer, global_norm(1.0)),  # type: ignore[arg-type]
        lambda: GradClipper(["x" * 500], global_norm(1.0)),  # type: ignore[list-item]
        lambda: GradClipper(model, model),  # type: ignore[arg-type]
        lambda: GradClipper(model, global_norm(1.0)).step(model),  # type: ignore[arg-type]
        lambda: Recorder(model, "run"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(ArgumentError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert len(message.partition(":")[0]) < 120


@on_ranks(3)
@pytest.mark.parametrize("has_earlier_call", [False, True])
def test_ranks_that_begin_with_different_communicators_rebind(has_earlier_call: bool) -> None:
    """Rank 2 finds a communicator of all ranks at once, and the others widen that of an earlier call."""
    rank, named = dist.get_rank(), []
    for name, members in (("w", [0, 1]), ("expert", [0, 2])):
        mesh = DeviceMesh("cpu", members)
        if rank in members:
            named.append((name, nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Shard(0)]))))
        if name == "w" and has_earlier_call and named:
            fill_with_ones([param for _, param in named])
            GradClipper(named, global_norm(1.0)).clip()
    clipper = GradClipper(named, global_norm(1.0))
    for _ in range(3):
        fill_with_ones([param for _, param in named])
        assert float(clipper.clip().norm) == 4.0
        clipper.rebind(named)


@on_ranks(2, 4)
@pytest.mark.parametrize("policy", [global_norm(1.0), per_tensor_norm(1.0)])
def test_a_rank_that_steps_instead_is_named(policy: object, num_ranks: int) -> None:
    (weight,) = params = [nn.Parameter(torch.zeros(4))]
    mesh = world_mesh("pp")
    clipper = GradClipper([("w", weight)], policy, split_over=mesh["pp"])  # type: ignore[arg-type]
    is_first = dist.get_rank() == 0

    def rebind() -> None:
        clipper.rebind([("w", weight)], split_over=mesh["pp"])

    for _ in range(2):
        fill_with_ones(params)
        assert_raises_on_ranks(
            rebind if is_first else clipper.clip, DisagreementError, "rebind", "clip", unchanged=weight.grad
        )
        rebind()
        assert float(clipper.clip().norms.norm()) == pytest.approx((4 * num_ranks) ** 0.5)


@on_ranks(2)
def test_a_step_that_one_rank_has_not_finished_raises_on_all() -> None:
    (weight,) = params = [nn.Parameter(torch.zeros(4))]
    mesh = world_mesh("pp")
    clipper, optimizer = GradClipper([("w", weight)], global_norm(1.0), split_over=mesh["pp"]), SGD(params, lr=0.0)
    fill_with_ones(params)
    clipper.start(optimizer)
    if dist.get_rank() == 0:
        clipper.finish(optimizer)
    assert_raises_on_ranks(
        lambda: clipper.rebind([("w", weight)], split_over=mesh["pp"]), ArgumentError, "finish", unchanged=weight
    )
    if dist.get_rank() == 1:
        clipper.finish(optimizer)
    clipper.rebind([("w", weight)], split_over=mesh["pp"])
    assert float(clipper.clip().norm) == pytest.approx(1.0)


@pytest.mark.parametrize("policy", [global_norm(0.1), per_tensor_norm(0.1), agc(0.01), value(0.1)])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_writes_a_decision_into_copies(policy: object, scale: float | None) -> None:
    model, measured = make_model(), make_model()
    clipper = GradClipper(measured, policy)  # type: ignore[arg-type]
    fill(model, 0)
    fill(measured, 0)
    GradClipper(model, policy).clip()  # type: ignore[arg-type]
    for param in measured.parameters():
        assert param.grad is not None
        param.grad.mul_(scale or 1.0)
    decision = clipper.decide(scale)
    copies = [copy.deepcopy(param.grad).double() for param in measured.parameters()]
    clipper.write_(decision, [1, 0, 2, 3], [copies[1], copies[0], copies[2], copies[3]])
    assert not decision.skip.read()
    for param, written in zip(model.parameters(), copies, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(written, param.grad.double(), rtol=1e-6, atol=1e-7)


def test_raises_the_error_of_the_caller() -> None:
    clipper = GradClipper(make_model(), global_norm(1.0))
    with pytest.raises(LayoutError, match="somewhere else"):
        clipper.decide(errors=FirstError(LayoutError("somewhere else")))
