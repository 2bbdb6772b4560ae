"""Clip where no number exists: torch's fake process group, FakeTensorMode and the meta device."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import distclip
from distclip import GradClipper, LayoutError
from tests.interpreter import forked_python
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import plain_param

POLICIES = [distclip.global_norm(1.0), distclip.zclip(), distclip.agc(), distclip.value(0.1)]


def backward(device: str = "cpu") -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, device=device), nn.Linear(4, 2, device=device))
    model(torch.ones(2, 4, device=device)).sum().backward()
    return model


def drop_ins(model: nn.Module) -> None:
    """Call all four functions."""
    norm = distclip.clip_grad_norm_(model, 1.0)
    norm = norm + distclip.get_total_norm([p.grad for p in model.parameters()])
    distclip.clip_grads_with_norm_(model, 1.0, norm)
    distclip.clip_grad_value_(model, 1.0)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        model = backward()
        drop_ins(model)
        assert isinstance(distclip.clip_grad_norm_(model, 1.0), FakeTensor)


def test_fake_tensors_of_a_device_that_does_not_exist() -> None:
    with FakeTensorMode():
        model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, 2, device="cuda"))})
        model["weight"].grad = torch.ones(2, 2, device="cuda")
        drop_ins(model)
        GradClipper(model, distclip.agc()).clip()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_clipper_of_fake_tensors(policy: Any) -> None:
    with FakeTensorMode():
        model = backward()
        clipper = GradClipper(model, policy)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            report = clipper.step(optimizer)
            clipper.clip()
            assert report.as_dict()["skipped"] is False


def test_fake_tensors_after_the_mode() -> None:
    with FakeTensorMode():
        model = backward()
    drop_ins(model)


def test_meta_device() -> None:
    model = backward("meta")
    drop_ins(model)
    GradClipper(model, distclip.agc(), on_nonfinite="propagate").clip()
    with pytest.raises(LayoutError, match="meta"):
        GradClipper(model, distclip.agc()).clip()


@on_ranks(2)
def test_meta_on_one_rank_is_refused() -> None:
    """A gradient without numbers is a mistake if other ranks have numbers."""
    mesh = world_mesh("pp")
    param = plain_param(torch.ones(3))
    if torch.distributed.get_rank() == 1:
        param = nn.Parameter(torch.zeros(3, device="meta"))
        param.grad = torch.ones(3, device="meta")
    assert_raises_on_ranks(
        lambda: distclip.clip_grad_norm_([("w", param)], 1.0, split_over=mesh["pp"]), LayoutError, "w", "meta"
    )


PROGRAM = """
import torch, torch.distributed as dist, distclip
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, DTensor, Partial
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch._subclasses.fake_tensor import FakeTensorMode

dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("pp", "dp"))
def run():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters())
    for policy in (distclip.global_norm(1.0), distclip.agc(), distclip.per_tensor_norm(1.0)):
        clipper = distclip.GradClipper(model, policy, split_over=mesh["pp"])
        model(torch.ones(2, 8)).sum().backward()
        clipper.step(optimizer)
        clipper.clip()
        # A sum over ranks that do not exist would show parameters that do not count once.
        assert distclip.audit(clipper, optimizer=optimizer).ok
    distclip.clip_grad_norm_(model, 1.0)
    distclip.clip_grad_norm_(model, 1.0, split_over=mesh["pp"])
run()
weight = torch.nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate(), Replicate()]))
weight.grad = DTensor.from_local(torch.ones(4), mesh, [Replicate(), Partial()])
distclip.clip_grad_norm_([weight], 1.0)
with FakeTensorMode():
    run()
"""


def test_fake_process_group() -> None:
    """Run in another process, because the fake process group is the default one there."""
    command = [str(forked_python()), "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ordinary_results_are_not_fake() -> None:
    model = backward()
    assert type(distclip.clip_grad_norm_(model, 1.0)) is torch.Tensor
