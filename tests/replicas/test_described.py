"""Compare `split_over=` with what shows in the first call: a missing axis of stages, and an axis of replicas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

import distclip
from distclip import GradClipper, ReplicaWarning, global_norm
from tests.ranks import gather_from_ranks, on_ranks
from tests.tables.layouts.meshes import group_of, world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad

CALLS: dict[str, Callable[..., Callable[[], object]]] = {
    "clip_grad_norm_": lambda params, **split: lambda: distclip.clip_grad_norm_(params, 1e9, **split),
    "GradClipper": lambda params, **split: GradClipper(params, global_norm(1e9), **split).clip,
}


def texts_of(call: Callable[[], object]) -> list[list[str]]:
    """Return the warnings of each rank. Any other warning than one about replicas is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {warning.category for warning in caught} <= {ReplicaWarning}
    return gather_from_ranks([str(warning.message) for warning in caught])


def calls_of(function: str, params: Any, **split: Any) -> Callable[[], object]:
    """Return a function that constructs what is needed, and makes four calls one after another on all ranks."""

    def run() -> None:
        call = CALLS[function](params, **split)
        for _ in range(4):
            call()
            dist.barrier()

    return run


@on_ranks(4)
@pytest.mark.parametrize("function", CALLS)
def test_stages_along_an_axis_that_nothing_describes_warn_on_all_ranks(function: str) -> None:
    mesh = world_mesh("dp", "pp")
    stage = mesh["pp"].get_local_rank()
    for split in ({}, {"split_over": mesh["dp"]}):
        found = texts_of(
            calls_of(function, [dtensor_param(random_grad(4, 3) + stage, mesh["dp"], [Shard(0)])], **split)
        )
        assert [len(texts) for texts in found] == [1] * 4
        assert all(texts[0].endswith('Pass split_over=mesh["pp"].') for texts in found)
    params = [dtensor_param(random_grad(4, 3) + stage, mesh["dp"], [Shard(0)])]
    for right in (mesh["pp"], mesh):
        assert texts_of(calls_of(function, params, split_over=right)) == [[]] * 4


@on_ranks(4)
def test_described_stages_are_silent() -> None:
    """A mesh that contains the axis, the stages of a clipper that is off, a sum over stages by the program itself."""
    mesh, grad = world_mesh("pp", "dp"), random_grad(4, 3)
    whole = dtensor_param(grad, mesh, [Replicate(), Shard(0)])
    stage = dtensor_param(grad, mesh["dp"], [Shard(0)])
    group = [group_of(0, 1), group_of(2, 3)][dist.get_rank() // 2]

    def calls() -> None:
        distclip.clip_grad_norm_([whole], 1e9)
        distclip.get_total_norm([stage.grad])  # type: ignore[list-item]
        GradClipper([stage], global_norm(1.0), replicas="off")
        distclip.clip_grad_norm_([stage], 1e9, comm=distclip.ProcessGroupComm(group))

    assert texts_of(calls) == [[]] * 4


def replicas(axis: str) -> tuple[Any, dict[str, Any]]:
    """Return equal tensors on all ranks, with an axis that declares them as different."""
    mesh = world_mesh(axis)
    return [plain_param(random_grad(3, 2)), plain_param(random_grad(2))], {"split_over": mesh}


def different(axis: str) -> tuple[Any, dict[str, Any]]:
    """Return tensors of which one differs between ranks."""
    params, split = replicas(axis)
    params[1].grad += dist.get_rank()
    return params, split


def constant(axis: str) -> tuple[Any, dict[str, Any]]:
    """Return gradients of ones."""
    params, split = replicas(axis)
    for param in params:
        param.grad.fill_(1.0)
    return params, split


def sharded(axis: str) -> tuple[Any, dict[str, Any]]:
    """Return a DTensor with equal shards on all ranks of the axis."""
    mesh = world_mesh(axis)
    grad = torch.arange(1.0, 4.0).repeat(dist.get_world_size(), 1)
    return [dtensor_param(grad, mesh, [Shard(0)])], {"split_over": mesh}


@on_ranks(2, 4)
@pytest.mark.parametrize("make", [replicas, different, constant, sharded])
@pytest.mark.parametrize("axis", ["dp", "pp"])
@pytest.mark.parametrize("function", CALLS)
def test_replicas_along_a_data_parallel_axis_warn_on_all_ranks(function: str, axis: str, make: Any) -> None:
    """Ranks of other axes may have started from one seed."""
    params, split = make(axis)
    found = texts_of(calls_of(function, params, **split))
    assert [len(texts) for texts in found] == [int(axis == "dp" and make is replicas)] * dist.get_world_size()
    assert all("so that replicas count several times" in text for texts in found for text in texts)
