"""torchtitan's signature on every layout that it meets: against the fp64 norm, and beside its own function."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
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
from distclip.sharding import named
from tests.ranks import RankError, World, everywhere
from tests.sharding.test_layouts import check_norm, check_scaled, stored
from tests.tables.layouts import LAYOUTS, Case
from tests.tables.layouts.model_parallel import known, made
from tests.tables.layouts.pipeline import plain

needs_torchtitan = pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")

RIGHT = ["fsdp2", "fsdp2_empty", "hsdp", "tp_sequence", "fsdp2_tp", "stages", "stages_fsdp2", "stage_without_gradients"]
RIGHT += ["stage_empty", "experts", "no_experts_used", "generator"]
WRONG = {
    "fp16_large": "squares in fp16",
    "fp32_huge": "squares in fp32",
    "fsdp2_bf16": "a norm in bf16",
    "listed_twice": "counts it twice",
}
RAISES = {
    "tp_plain_norm": (RuntimeError, "mixed torch.Tensor and DTensor"),
    "fsdp2_columns_and_ignored": (RuntimeError, "mixed torch.Tensor and DTensor"),
    "many_meshes": (RuntimeError, "mixed torch.Tensor and DTensor"),
    "crossing_axes": (RuntimeError, "must have the same mesh"),
    "expert_and_plain_router": (AssertionError, None),
}


def no_experts_used() -> Case:
    case = LAYOUTS["experts"].build()
    case.parameters[0].grad = None
    return Case(case.parameters, case.whole[1:])


def expert_and_plain_router() -> Case:
    case = LAYOUTS["experts"].build()
    router = known(5, 4, seed=9)
    return Case([*case.parameters, plain(router)], [*case.whole, router])


OWN = {build.__name__: build for build in (no_experts_used, expert_and_plain_router)}


def build(name: str) -> tuple[Case, bool]:
    """A case, and whether torchtitan would say that there are experts."""
    return (OWN.get(name) or LAYOUTS[name].build)(), "expert" in name


def theirs() -> Any:
    """The original; not in the process of the tests, which it takes seconds to import into."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchtitan.distributed import utils
    return utils.clip_grad_norm_


def check_ours(name: str, norm_type: float) -> None:
    case, experts = build(name)
    kept = list(case.parameters)
    grads = [p.grad for _, p in named(kept) if p.grad is not None]
    before = [stored(g).clone() for g in grads]
    expected = reference.total_norm(case.whole, norm_type)
    passed = iter(kept) if isinstance(case.parameters, Iterator) else kept
    bound = float(expected) / 2
    norm = clip_grad_norm_(passed, bound, norm_type, foreach=True, pp_mesh=case.split_over, ep_enabled=experts)
    check_norm(norm, expected, case, name)
    for grad, old in zip(grads, before, strict=True):
        check_scaled(stored(grad), old, float(reference.clip_coefficient(expected, bound)), name)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("name", [*RIGHT, *WRONG, *RAISES, "stages_dtypes", "experts_idle", "fsdp2_one_rank_without"])
def test_agrees_with_the_whole_gradient(ranks: Callable[[int], World], name: str, norm_type: float) -> None:
    ranks(4).run(check_ours, name=name, norm_type=norm_type)


@pytest.mark.parametrize("name", ["fsdp2", "tp_plain_norm", "stages", "stages_dtypes"])
def test_agrees_on_two_ranks(ranks: Callable[[int], World], name: str) -> None:
    ranks(2).run(check_ours, name=name, norm_type=2.0)


def check_alike(name: str, norm_type: float) -> None:
    answers = []
    for clip in (theirs(), clip_grad_norm_):
        case, experts = build(name)
        parameters = list(case.parameters)
        bound = float(reference.total_norm(case.whole, norm_type)) / 2
        norm = clip(iter(parameters), bound, norm_type, pp_mesh=case.split_over, ep_enabled=experts)
        answers.append([norm, *(stored(p.grad).clone() for p in parameters if p.grad is not None)])
    for one, two in zip(*answers, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=0, msg=name)


@needs_torchtitan
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("name", RIGHT)
def test_does_what_the_original_does_where_that_is_right(
    ranks: Callable[[int], World], name: str, norm_type: float
) -> None:
    if norm_type != 2 and name in ("fsdp2_empty", "generator"):
        pytest.skip("torch's inf-norm raises on the ranks with an empty shard, and the others hang")
    ranks(4).run(check_alike, name=name, norm_type=norm_type)


def error_of_theirs(name: str) -> float:
    case, experts = build(name)
    norm = theirs()(case.parameters, 1.0, pp_mesh=case.split_over, ep_enabled=experts)
    expected = float(reference.total_norm(case.whole))
    return abs(float(norm) - expected) / expected


@needs_torchtitan
@pytest.mark.parametrize("name", WRONG)
def test_the_original_is_wrong(ranks: Callable[[int], World], name: str) -> None:
    assert min(ranks(4).run(error_of_theirs, name=name)) > 5e-5


def check_raises(name: str) -> None:
    case, experts = build(name)
    kind, text = RAISES[name]
    with pytest.raises(kind, match=text):
        theirs()(list(case.parameters), 1.0, pp_mesh=case.split_over, ep_enabled=experts)


@needs_torchtitan
@pytest.mark.parametrize("name", RAISES)
def test_the_original_raises(ranks: Callable[[int], World], name: str) -> None:
    ranks(4).run(check_raises, name=name)


def trouble(what: str) -> tuple[Any, dict[str, Any]]:
    """Arguments with which the original leaves a rank alone in a collective, which gives up soon."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("pp",))
    first = dist.get_rank() == 0
    if what == "dtypes":
        return [plain(known(40, 3).to(torch.float32 if first else torch.bfloat16))], {"pp_mesh": mesh}
    if what == "error on one stage":
        param = plain(known(4, 3))
        if first:
            param.grad[0] = float("nan")
        return [param], {"pp_mesh": mesh, "error_if_nonfinite": True}
    param = made(known(4, 3), mesh, [Shard(0)])
    if first:
        param.grad = None
    return [param], {}


TROUBLES = ["dtypes", "error on one stage", "a rank without gradient"]


def outcome(clip: Any, what: str) -> str:
    parameters, kwargs = trouble(what)
    try:
        return f"{float(clip(parameters, 1.0, **kwargs)):.4f}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_trouble(what: str) -> list[str]:
    return everywhere(outcome(clip_grad_norm_, what))


@pytest.mark.parametrize("what", TROUBLES)
def test_ranks_stay_together(ranks: Callable[[int], World], what: str) -> None:
    one, two = ranks(2).run(check_trouble, what=what)[0]
    if what == "error on one stage":
        assert one == two
        assert one.startswith(f"{NonFiniteError.__name__}: The total norm of order 2.0 for gradients")
    else:
        assert one == two and float(one) > 0


def check_their_trouble(what: str) -> str:
    return outcome(theirs(), what)


@needs_torchtitan
@pytest.mark.parametrize("what", TROUBLES)
def test_ranks_of_the_original_part(what: str) -> None:
    world = World(2)  # gloo's threads of the rank that was left alone are not used again
    try:
        one, two = world.run(check_their_trouble, what=what)
    except RankError as error:
        assert "the process died" in str(error)  # gloo ends a rank that gets more bytes than it asked for
        return
    finally:
        world.stop()
    assert one != two
    assert "Error" in one + two


def parameters_of(kind: str) -> list[tuple[str, Any]]:
    clip = theirs() if kind == "theirs" else clip_grad_norm_
    return [(p.name, p.default) for p in inspect.signature(clip).parameters.values()]


@needs_torchtitan
def test_has_their_signature(ranks: Callable[[int], World]) -> None:
    assert ranks(4).run(parameters_of, kind="theirs")[0] == parameters_of("ours")
