"""torchtitan's `clip_grad_norm_` on the layouts that it supports, against float64 norms and its own function."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from distclip import NonFiniteError, reference
from distclip.integrations.torchtitan import clip_grad_norm_
from distclip.sharding import name_tensors
from tests.ranks import RankError, World, gather_from_ranks, on_ranks
from tests.sharding.checks import check_norm, check_scaled, stored
from tests.tables.layouts import LAYOUTS, Case
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad

needs_torchtitan = pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")

CORRECT = ["fsdp2", "fsdp2_empty", "hsdp", "tp_sequence", "fsdp2_tp", "stages", "stages_fsdp2"]
CORRECT += ["stage_without_gradients", "stage_empty", "experts", "no_experts_used", "generator"]
"""Layouts in which torchtitan's function is correct."""
WRONG = {
    "fp16_large": "squares in fp16",
    "fp32_huge": "squares in fp32",
    "fsdp2_bf16": "a norm in bf16",
    "listed_twice": "counts it twice",
}
"""Layouts in which torchtitan's norm is wrong, and why."""
RAISES = {
    "tp_plain_norm": (RuntimeError, "mixed torch.Tensor and DTensor"),
    "fsdp2_columns_and_ignored": (RuntimeError, "mixed torch.Tensor and DTensor"),
    "many_meshes": (RuntimeError, "mixed torch.Tensor and DTensor"),
    "crossing_axes": (RuntimeError, "must have the same mesh"),
    "expert_and_plain_router": (AssertionError, None),
}
"""Layouts in which torchtitan's function raises."""
MORE = ["stages_dtypes", "experts_idle", "fsdp2_one_rank_without"]


def no_experts_used() -> Case:
    case = LAYOUTS["experts"].build()
    case.parameters[0].grad = None
    return Case(case.parameters, case.whole[1:])


def expert_and_plain_router() -> Case:
    case = LAYOUTS["experts"].build()
    router = random_grad(5, 4, seed=9)
    return Case([*case.parameters, plain_param(router)], [*case.whole, router])


EXTRA = {build.__name__: build for build in (no_experts_used, expert_and_plain_router)}


def build(name: str) -> tuple[Case, bool]:
    """Return a case, and the `ep_enabled` that torchtitan would pass."""
    return (EXTRA.get(name) or LAYOUTS[name].build)(), "expert" in name


def torchtitan_function() -> Any:
    """Return torchtitan's function. Only ranks call this, because the import takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchtitan.distributed import utils
    return utils.clip_grad_norm_


def check_layout(name: str, norm_type: float) -> None:
    """Check the norm and the scaled gradients against float64."""
    case, ep_enabled = build(name)
    kept = list(case.parameters)
    grads = [p.grad for _, p in name_tensors(kept) if p.grad is not None]
    before = [stored(grad).clone() for grad in grads]
    expected = reference.total_norm(case.whole, norm_type)
    passed = iter(kept) if isinstance(case.parameters, Iterator) else kept
    bound = float(expected) / 2
    norm = clip_grad_norm_(passed, bound, norm_type, foreach=True, pp_mesh=case.split_over, ep_enabled=ep_enabled)
    check_norm(norm, expected, case, name)
    for grad, old in zip(grads, before, strict=True):
        check_scaled(stored(grad), old, float(reference.clip_coefficient(expected, bound)), name)


@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize(
    ("name", "norm_type"),
    [*((name, 2.0) for name in (*CORRECT, *WRONG, *RAISES, *MORE)), *((name, float("inf")) for name in WRONG)],
)
def test_matches_the_whole_gradient(name: str, norm_type: float) -> None:
    check_layout(name, norm_type)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("name", ["fsdp2", "tp_plain_norm", "stages", "stages_dtypes"])
def test_matches_the_whole_gradient_on_two_ranks(name: str) -> None:
    check_layout(name, 2.0)


@needs_torchtitan
@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize(
    ("name", "norm_type"),
    [
        *((name, 2.0) for name in CORRECT),
        # torch's inf-norm raises on the ranks with an empty shard, and the other ranks hang.
        *((name, float("inf")) for name in CORRECT if name not in ("fsdp2_empty", "generator")),
    ],
)
def test_matches_torchtitan_where_it_is_correct(name: str, norm_type: float) -> None:
    results = []
    for clip in (torchtitan_function(), clip_grad_norm_):
        case, ep_enabled = build(name)
        parameters = list(case.parameters)
        bound = float(reference.total_norm(case.whole, norm_type)) / 2
        norm = clip(iter(parameters), bound, norm_type, pp_mesh=case.split_over, ep_enabled=ep_enabled)
        results.append([norm, *(stored(p.grad).clone() for p in parameters if p.grad is not None)])
    for by_torchtitan, by_distclip in zip(*results, strict=True):
        torch.testing.assert_close(by_torchtitan, by_distclip, rtol=2e-6, atol=0, msg=name)


@needs_torchtitan
@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize("name", WRONG)
def test_torchtitan_is_wrong(name: str) -> None:
    case, ep_enabled = build(name)
    norm = torchtitan_function()(case.parameters, 1.0, pp_mesh=case.split_over, ep_enabled=ep_enabled)
    expected = float(reference.total_norm(case.whole))
    assert abs(float(norm) - expected) / expected > 5e-5


@needs_torchtitan
@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize("name", RAISES)
def test_torchtitan_raises(name: str) -> None:
    case, ep_enabled = build(name)
    kind, text = RAISES[name]
    with pytest.raises(kind, match=text):
        torchtitan_function()(list(case.parameters), 1.0, pp_mesh=case.split_over, ep_enabled=ep_enabled)


UNEQUAL = ["dtypes", "error on one stage", "a rank without gradient"]
"""Arguments with which torchtitan leaves a rank alone in a collective."""


def unequal_arguments(kind: str) -> tuple[Any, dict[str, Any]]:
    """Return arguments that differ between the ranks. Collectives over their group soon give up."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("pp",))
    first = dist.get_rank() == 0
    if kind == "dtypes":
        return [plain_param(random_grad(40, 3).to(torch.float32 if first else torch.bfloat16))], {"pp_mesh": mesh}
    if kind == "error on one stage":
        param = plain_param(random_grad(4, 3))
        if first:
            assert param.grad is not None
            param.grad[0] = float("nan")
        return [param], {"pp_mesh": mesh, "error_if_nonfinite": True}
    param = dtensor_param(random_grad(4, 3), mesh, [Shard(0)])
    if first:
        param.grad = None
    return [param], {}


def outcome_of(clip: Any, kind: str) -> str:
    """Return the norm, or the error, as text."""
    parameters, kwargs = unequal_arguments(kind)
    try:
        return f"{float(clip(parameters, 1.0, **kwargs)):.4f}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def outcome_of_torchtitan(kind: str) -> str:
    return outcome_of(torchtitan_function(), kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", UNEQUAL)
def test_unequal_arguments_have_one_outcome(kind: str) -> None:
    first, second = gather_from_ranks(outcome_of(clip_grad_norm_, kind))
    assert first == second
    if kind == "error on one stage":
        assert first.startswith(f"{NonFiniteError.__name__}: The total norm of order 2.0 for gradients")
    else:
        assert float(first) > 0


@needs_torchtitan
@pytest.mark.parametrize("kind", UNEQUAL)
def test_unequal_arguments_have_two_outcomes_in_torchtitan(kind: str, isolated_ranks: Any) -> None:
    world: World = isolated_ranks(2)
    try:
        first, second = world.run(outcome_of_torchtitan, kind=kind)
    except RankError as error:
        # gloo ends a rank that receives more bytes than it asked for.
        assert "the process died" in str(error)  # noqa: PT017
        return
    finally:
        # The threads of the rank that was left alone must not be used again.
        world.stop()
    assert first != second
    assert "Error" in first + second


@needs_torchtitan
@on_ranks(2, fixture="ranks")
def test_signature_is_torchtitans() -> None:
    signatures = [inspect.signature(function) for function in (torchtitan_function(), clip_grad_norm_)]
    by_torchtitan, by_distclip = ([(p.name, p.default) for p in s.parameters.values()] for s in signatures)
    assert by_torchtitan == by_distclip
