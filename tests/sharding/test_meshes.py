"""Count shards on meshes in any order, over some ranks only, several at a time, and meshes that join later."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import distclip
from distclip import LayoutError, reference
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import assert_raises_on_ranks, local_tensor
from tests.tables.layouts.meshes import mesh_of, world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad, tagged_param

ROWS = distclip.NormPolicy(distclip.Fixed(1.0), per="row", eps=0.0)


@on_ranks(4)
@pytest.mark.parametrize("kind", ["dtensor", "annotation", "tags"])
def test_rows_on_a_mesh_whose_ranks_do_not_ascend(kind: str) -> None:
    # torch's own full_tensor() joins the shards of such a mesh in another order, so it is no reference here.
    mesh = DeviceMesh("cpu", torch.tensor([[1, 0], [2, 3]]), mesh_dim_names=("a", "b"))
    whole, split_over = random_grad(6, 4), None
    column, row = mesh.get_coordinate()
    local = whole.chunk(2, 1)[column].chunk(2, 0)[row].clone()
    if kind == "dtensor":
        param = nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(1), Shard(0)], run_check=False))
        param.grad = DTensor.from_local(local.clone(), mesh, [Shard(1), Shard(0)], run_check=False)
    elif kind == "annotation":
        param = distclip.annotate_(plain_param(local), mesh, [Shard(1), Shard(0)])
    else:
        param, split_over = tagged_param(local, tensor_model_parallel=True, partition_dim=0), {"tp": mesh["b"]}
        whole = whole.chunk(2, 1)[column]  # Each line of the mesh holds a separate model.
    expected = whole.double().norm(dim=1)
    norms = distclip.GradClipper([("w", param)], ROWS, split_over=split_over).clip().norms
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    clipped = local / expected.float().chunk(2)[row][:, None].clamp(min=1)
    torch.testing.assert_close(local_tensor(param.grad), clipped, rtol=1e-5, atol=0)


def on(mesh: DeviceMesh, seed: int, shape: tuple[int, ...] = (6, 4)) -> tuple[nn.Parameter, torch.Tensor]:
    """Make a parameter that is sharded over a mesh, and return it with its whole gradient."""
    whole = random_grad(*shape, seed=seed)
    return dtensor_param(whole, mesh, [Shard(0)]), whole


def held(ranks: tuple[int, ...], seed: int, shape: tuple[int, ...] = (6, 4)) -> tuple[list[nn.Parameter], torch.Tensor]:
    """Make a parameter on the mesh of some ranks: nothing on the other ranks, and its whole gradient on all."""
    mesh = mesh_of(*ranks)
    if dist.get_rank() in ranks:
        return [on(mesh, seed, shape)[0]], random_grad(*shape, seed=seed)
    return [], random_grad(*shape, seed=seed)


def check(parameters: object, whole: list[torch.Tensor], **options: object) -> None:
    """Check the norm of a function, which counts every element once, and of a clipper."""
    expected = reference.total_norm(whole)
    for norm in (
        distclip.clip_grad_norm_(parameters, math.inf, **options),
        distclip.GradClipper(parameters, distclip.global_norm(math.inf), **options).clip().norm,
    ):
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        assert len(set(gather_from_ranks(norm.item()))) == 1


def named(names: str, params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(names, params, strict=True))


@on_ranks(4)
@pytest.mark.parametrize("holders", [(0, 1), (2,), (1, 3), (0, 2, 3)])
def test_mesh_over_some_ranks(holders: tuple[int, ...]) -> None:
    dense, dense_grad = on(world_mesh("all"), 1)
    expert, expert_grad = held(holders, 2)
    check([dense, *expert], [dense_grad, expert_grad])
    check([*expert, dense], [dense_grad, expert_grad])
    check([("dense", dense), *(("expert", p) for p in expert)], [dense_grad, expert_grad])
    if 0 not in holders:
        check([dense, *expert, *held((0,), 3, (5,))[0]], [dense_grad, expert_grad, held((0,), 3, (5,))[1]])


@on_ranks(4)
def test_meshes_that_overlap_hold_different_parameters() -> None:
    one, one_grad = held((0, 1), 1)
    two, two_grad = held((1, 2), 2)
    last, last_grad = held((2, 3), 3, (5,))
    check([*one, *two, *last], [one_grad, two_grad, last_grad])
    names = [*("a" for _ in one), *("b" for _ in two), *("c" for _ in last)]
    pairs = list(zip(names, [*one, *two, *last], strict=True))
    check(pairs, [one_grad, two_grad, last_grad])
    norms = distclip.GradClipper(pairs, distclip.per_tensor_norm(math.inf)).clip().norms
    expected = torch.stack([grad.double().norm() for grad in (one_grad, two_grad, last_grad)])
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)


@on_ranks(4)
def test_disjoint_meshes_hold_replicas_of_one_name_or_list() -> None:
    """The meshes are slices, as under FSDP2 in each replica of DDP. The dense parameter connects them."""
    dense, dense_grad = on(world_mesh("all"), 1)
    inner = [on(world_mesh("dp", "tp")["tp"], seed, (6, seed)) for seed in (2, 3)]
    params, grads = [dense, *(p for p, _ in inner)], [dense_grad, *(g for _, g in inner)]
    check(params, grads)
    check(named("abc", params), grads)
    norms = distclip.GradClipper(named("abc", params), distclip.per_tensor_norm(math.inf)).clip().norms
    torch.testing.assert_close(norms, torch.stack([g.double().norm() for g in grads]), rtol=1e-6, atol=0)


@on_ranks(4)
def test_names_distinguish_what_lists_cannot() -> None:
    dense, dense_grad = on(world_mesh("all"), 1)
    left, left_grads = zip(held((0, 1), 2), held((0, 1), 3), strict=True)
    right, right_grad = held((2, 3), 4)
    local = [p for params in (*left, right) for p in params]
    assert_raises_on_ranks(lambda: distclip.clip_grad_norm_([dense, *local], 1.0), LayoutError, "named_parameters")
    policy = distclip.global_norm(1.0)
    assert_raises_on_ranks(lambda: distclip.GradClipper([dense, *local], policy), LayoutError, "named_parameters")
    check(
        [("dense", dense), *named("ab" if dist.get_rank() < 2 else "c", local)], [dense_grad, *left_grads, right_grad]
    )
    # Now "a" is one parameter, with replicas on two meshes.
    same, same_grad = held((2, 3), 2)
    pairs = named("ab", local) if dist.get_rank() < 2 else named("a", same)
    check([("dense", dense), *pairs], [dense_grad, *left_grads])
    torch.testing.assert_close(same_grad, left_grads[0])


@on_ranks(4)
@pytest.mark.parametrize("other", ["plain", "overlapping", "another shape"])
def test_one_name_for_different_parameters(other: str) -> None:
    dense, dense_grad = on(world_mesh("all"), 1)
    left, left_grad = held((0, 1), 2)
    right, right_grad = held(
        (1, 2, 3) if other == "overlapping" else (2, 3), 3, (6, 4) if other != "another shape" else (3, 5)
    )
    mine = left if dist.get_rank() < 2 else right
    if other == "plain" and dist.get_rank() >= 2:
        mine = [plain_param(random_grad(6, 4))]
    pairs = [("dense", dense), ("w", mine[0])]
    if other != "another shape":
        assert_raises_on_ranks(lambda: distclip.clip_grad_norm_(pairs, 1.0), LayoutError, "w ", "different names")
        return
    check(pairs, [dense_grad, left_grad, right_grad])
    policy = distclip.per_tensor_norm(1.0)
    assert_raises_on_ranks(lambda: distclip.GradClipper(pairs, policy), LayoutError, "w ", "different names")


@on_ranks(4)
def test_positions_that_differ_between_ranks_have_no_slots() -> None:
    dense, _ = on(world_mesh("all"), 1)
    expert, _ = held((0, 1), 2)
    bias = [plain_param(random_grad(3)), plain_param(random_grad(5))]
    policy = distclip.per_tensor_norm(1.0)
    for params in ([*expert, dense], [dense, *(bias if dist.get_rank() else bias[::-1])]):
        assert_raises_on_ranks(lambda p=params: distclip.GradClipper(p, policy), LayoutError, "named_parameters")


@on_ranks(4)
def test_experts_on_some_ranks_of_a_stage() -> None:
    """Two stages of two ranks each. The expert of the first stage is on one of its ranks, and has replicas nowhere."""
    mesh = world_mesh("pp", "dp")
    stage = mesh.get_local_rank("pp")
    own = [on(mesh["dp"], 10 + s) for s in range(2)][stage]
    expert, expert_grad = held((1,), 5)
    whole = [random_grad(6, 4, seed=10), random_grad(6, 4, seed=11), expert_grad]
    check([own[0], *expert], whole, split_over=mesh["pp"])
    check([("w", own[0]), *(("expert", p) for p in expert)], whole, split_over=mesh["pp"])


@on_ranks(4)
@pytest.mark.parametrize("first", ["all", "pairs", "one pair"])
def test_meshes_join_and_leave(first: str) -> None:
    """The parameters of each call are on other meshes, and every call measures all of them."""
    everywhere, pair, other, cross = on(world_mesh("all"), 1), held((0, 1), 2), held((2, 3), 3, (5,)), held((1, 2), 4)
    calls = {
        "all": ([everywhere[0]], [everywhere[1]]),
        "all and a pair": ([everywhere[0], *pair[0]], [everywhere[1], pair[1]]),
        "all and pairs": ([everywhere[0], *pair[0], *other[0]], [everywhere[1], pair[1], other[1]]),
        "pairs that overlap": ([*pair[0], *other[0], *cross[0]], [pair[1], other[1], cross[1]]),
    }
    order = list(calls) if first == "all" else list(calls)[::-1]
    if first == "one pair" and pair[0]:
        norm = distclip.clip_grad_norm_(pair[0], math.inf)
        torch.testing.assert_close(norm, pair[1].norm())
    for name in [*order, *order[::-1], *order]:
        params, whole = calls[name]
        norm = distclip.clip_grad_norm_(params, math.inf)
        torch.testing.assert_close(norm.double(), reference.total_norm(whole), rtol=1e-6, atol=0, msg=name)
        if pair[0] and first == "one pair":
            torch.testing.assert_close(distclip.clip_grad_norm_(pair[0], math.inf), pair[1].norm())


@on_ranks(4)
def test_meshes_within_stages_join_and_leave() -> None:
    """Some calls have meshes within both stages, others within one, whose ranks cannot distinguish these calls."""
    mesh = world_mesh("pp", "dp")
    stage = mesh.get_local_rank("pp")
    grads = [random_grad(6, 4, seed=s) for s in range(2)]
    param, bias = dtensor_param(grads[stage], mesh["dp"], [Shard(0)]), random_grad(3, seed=5 + stage)
    biases = [random_grad(3, seed=5 + s) for s in range(2)]
    calls = {
        "none": ([plain_param(bias)], biases),
        "both": ([param, plain_param(bias)], [*grads, *biases]),
        "first": ([*([param] if stage == 0 else []), plain_param(bias)], [grads[0], *biases]),
    }
    for name in ("none", "first", "both", "first", "none", "both", "first"):
        params, whole = calls[name]
        norm = distclip.clip_grad_norm_(params, math.inf, split_over=mesh["pp"])
        torch.testing.assert_close(norm.double(), reference.total_norm(whole), rtol=1e-6, atol=0, msg=name)
        norms = distclip.GradClipper(
            [(f"p{i}", p) for i, p in enumerate(params)], distclip.per_tensor_norm(math.inf), split_over=mesh["pp"]
        ).clip()
        expected = reference.total_norm(whole)
        torch.testing.assert_close(norms.norm.double(), expected, rtol=1e-6, atol=0, check_dtype=False, msg=name)
