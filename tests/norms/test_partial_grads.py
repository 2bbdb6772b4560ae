"""Reduce partial gradients that only some ranks have, over any axes, and refuse those that do not add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import distclip
from distclip import LayoutError, reference
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import mesh_of, world_mesh
from tests.tables.layouts.tensors import plain_param, random_grad

SUBSETS = [ranks for n in (1, 2, 3) for ranks in itertools.combinations(range(4), n)]


def summand(rank: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Return the summand of one rank, which every rank can compute."""
    return random_grad(*shape, seed=100 * seed + rank)


def param_of(
    mesh: DeviceMesh, grad: torch.Tensor | None, placements: Sequence[object], shape: tuple[int, ...]
) -> nn.Parameter:
    """Make a replicated parameter with a gradient in other placements, or without one."""
    whole = [Replicate() if p.is_partial() else p for p in placements]
    zeros = torch.zeros(shape, dtype=None if grad is None else grad.dtype)
    param = nn.Parameter(DTensor.from_local(zeros, mesh, whole, run_check=False))
    if grad is not None:
        param.grad = DTensor.from_local(grad, mesh, placements, run_check=False)
    return param


def check(params: Sequence[nn.Parameter], whole: Sequence[torch.Tensor], norm_type: float = 2.0) -> None:
    """Check the norm, and that it has the same bits on every rank."""
    norm = distclip.clip_grad_norm_(params, math.inf, norm_type)
    torch.testing.assert_close(norm.double(), reference.total_norm(whole, norm_type), rtol=1e-6, atol=0)
    assert len(set(gather_from_ranks(norm.item()))) == 1


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_some_ranks_have_a_gradient_that_is_partial_along_two_axes(norm_type: float) -> None:
    mesh, rank = world_mesh("a", "b"), dist.get_rank()
    for holders in SUBSETS:
        params = [param_of(mesh, summand(rank, 5) if rank in holders else None, [Partial(), Partial()], (5,))]
        check(params, [sum(summand(r, 5) for r in holders)], norm_type)


@on_ranks(4)
def test_some_ranks_have_a_gradient_that_is_partial_and_sharded() -> None:
    mesh, rank = world_mesh("a", "b"), dist.get_rank()
    for holders in SUBSETS:
        grad = summand(rank, 3, 2) if rank in holders else None
        pieces = [[summand(r, 3, 2) for r in column if r in holders] for column in ((0, 2), (1, 3))]
        whole = torch.cat([sum(column, torch.zeros(3, 2)) for column in pieces])
        check([param_of(mesh, grad, [Partial(), Shard(0)], (3, 2))], [whole])


@on_ranks(4)
def test_norms_per_row_of_a_partial_gradient_that_some_ranks_have() -> None:
    mesh, rank = world_mesh("a", "b"), dist.get_rank()
    for holders in ((0, 1, 3), (2, 3)):
        param = param_of(mesh, summand(rank, 3, 2) if rank in holders else None, [Partial(), Shard(0)], (3, 2))
        pieces = [[summand(r, 3, 2) for r in column if r in holders] for column in ((0, 2), (1, 3))]
        whole = torch.cat([sum(column, torch.zeros(3, 2)) for column in pieces])
        policy = distclip.NormPolicy(distclip.Fixed(math.inf), per="row")
        norms = distclip.GradClipper([("w", param)], policy).clip().norms
        torch.testing.assert_close(norms, whole.double().norm(dim=1), rtol=1e-6, atol=0)


@on_ranks(4)
def test_partial_along_the_axes_of_a_mesh_and_of_an_annotation() -> None:
    mesh, rank = world_mesh("a", "b"), dist.get_rank()
    for holders in SUBSETS:
        param = param_of(mesh["a"], summand(rank, 5) if rank in holders else None, [Partial()], (5,))
        check([distclip.annotate_(param, mesh["b"], [Partial()])], [sum(summand(r, 5) for r in holders)])


@on_ranks(4)
def test_equal_ranks_under_two_meshes() -> None:
    """Only one of the two parameters has a gradient on a rank, and each mesh has separate process groups."""
    rank, meshes = dist.get_rank(), (world_mesh("one"), mesh_of(0, 1, 2, 3))
    params = [
        param_of(mesh, summand(rank, 5, seed=i) if rank % 2 == i else None, [Partial()], (5,))
        for i, mesh in enumerate(meshes)
    ]
    check(params, [sum(summand(r, 5, seed=i) for r in range(i, 4, 2)) for i in range(2)])


@on_ranks(4)
def test_dtypes_that_differ_between_ranks() -> None:
    mesh, rank = world_mesh("a", "b"), dist.get_rank()
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    check(
        [param_of(mesh, summand(rank, 5).to(dtypes[rank]), [Partial(), Partial()], (5,))],
        [sum(summand(r, 5).to(dtypes[r]).double() for r in range(4))],
    )


@on_ranks(4)
@pytest.mark.parametrize("kind", ["shape", "axes", "no sum", "order", "missing", "annotation"])
def test_gradients_that_do_not_add_up_are_refused(kind: str) -> None:
    mesh, rank = world_mesh("a", "b"), dist.get_rank()
    both = [Partial(), Partial()]
    one, two = (param_of(mesh, summand(rank, 5, seed=i), both, (5,)) for i in range(2))
    params, odd = [("one", one), ("two", two)], rank == 2
    if odd and kind == "shape":
        params[0] = ("one", param_of(mesh, torch.ones(4), both, (4,)))
    elif odd and kind == "axes":
        one.grad = DTensor.from_local(torch.ones(5), mesh, [Replicate(), Partial()], run_check=False)
    elif odd and kind == "no sum":
        one.grad = DTensor.from_local(torch.ones(5), mesh, [Replicate(), Replicate()], run_check=False)
    elif odd and kind == "order":
        flat = param_of(world_mesh("all"), summand(rank, 5), [Partial()], (5,))
        params = [("one", flat), ("two", one)]
    elif odd and kind == "missing":
        params = [("two", two)]
    elif odd and kind == "annotation":
        params = [("one", plain_param(torch.ones(5))), ("two", two)]
    assert_raises_on_ranks(lambda: distclip.clip_grad_norm_(params, 1.0), LayoutError, "one", "every rank")
