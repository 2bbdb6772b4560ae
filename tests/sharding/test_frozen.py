"""Leave frozen parameters out: no reads, no slots, no layouts; and notice when they train again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard

import distclip
from distclip import ArgumentError, GradClipper
from distclip.policies.agc import RelativeToWeight
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad, tagged_param

WEIGHT_RULE = distclip.NormPolicy(RelativeToWeight(0.01))

POLICIES = {
    "model": distclip.global_norm(1.0),
    "model, by weights": WEIGHT_RULE,
    "group": distclip.group_norm({name: {"pattern": name, "max_norm": 1.0} for name in ("adapter", "base")}),
    "tensor": distclip.per_tensor_norm(1.0),
    "row": distclip.agc(0.01),
}


class Unreadable(torch.Tensor):
    """Can be detached, and nothing else."""

    @staticmethod
    def __new__(cls) -> Unreadable:
        return torch.Tensor._make_wrapper_subclass(cls, (8, 8), dtype=torch.float32)

    def __repr__(self) -> str:
        return "Unreadable"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls()
        raise NotImplementedError(f"{func} reads it")


FROZEN = {
    "plain": lambda: torch.full((8, 8), 1e6),
    "packed": lambda: torch.zeros(4096, 1, dtype=torch.uint8),
    "few operators": lambda: Unreadable(),
    "meta": lambda: torch.zeros(8, 8, device="meta"),
    "not a number": lambda: torch.full((8, 8), float("nan")),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
}


def freeze(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def adapter() -> nn.Parameter:
    param = nn.Parameter(torch.full((2, 8), 0.1))
    param.grad = torch.ones(2, 8)
    return param


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FROZEN)
def test_clips_as_without_frozen_parameters(name: str, policy: str) -> None:
    alone, beside, base = adapter(), adapter(), freeze(FROZEN[name]())
    GradClipper([("adapter", alone), ("base", freeze(torch.zeros(1)))], POLICIES[policy]).clip()
    clipper = GradClipper([("base", base), ("adapter", beside)], POLICIES[policy])
    report = clipper.clip()
    assert torch.equal(alone.grad, beside.grad)
    assert len(report.norms) == {"tensor": 1, "row": 2, "group": 3}.get(policy, 1)
    assert report.norms.isfinite().all()
    with_bounds = report.bounds is not None and bool(report.bounds.isfinite().all())
    assert with_bounds
    clipper.measure_tensors()
    clipper.clip()
    assert clipper.tensors == ("adapter",)


def test_patterns_may_match_frozen_parameters_only() -> None:
    policy = distclip.agc(exclude=["base"])
    assert len(GradClipper([("base", freeze(torch.ones(2))), ("adapter", adapter())], policy).slots) == 2


@pytest.mark.parametrize("policy", ["tensor", "row"])
def test_unfrozen_parameter_is_refused_until_rebind(policy: str) -> None:
    base, param = freeze(torch.ones(3, 2)), adapter()
    named = [("base", base), ("adapter", param)]
    clipper = GradClipper(named, POLICIES[policy])
    clipper.clip()
    base.requires_grad_()
    param.grad, base.grad = torch.ones(2, 8), torch.ones(3, 2)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"base .*clipper\.rebind"):
            clipper.clip()
        assert torch.equal(param.grad, torch.ones(2, 8))
    clipper.rebind(named)
    clipper.clip()
    assert float(base.grad.norm()) <= 1.00001


@pytest.mark.parametrize("policy", ["model", "group"])
def test_unfrozen_parameter_counts_in_a_norm_that_exists(policy: str) -> None:
    base, param = freeze(torch.ones(3, 2)), adapter()
    clipper = GradClipper([("base", base), ("adapter", param)], POLICIES[policy])
    clipper.clip()
    base.requires_grad_()
    param.grad, base.grad = torch.ones(2, 8), 10 * torch.ones(3, 2)
    norms = clipper.clip().norms
    assert float(norms.norm()) == pytest.approx((16 + 600) ** 0.5)


def test_frozen_parameter_with_a_gradient_trains() -> None:
    """A gradient that was assigned by hand is clipped, whatever requires_grad is."""
    param = freeze(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    GradClipper([("w", param)], distclip.per_tensor_norm(1.0)).clip()
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


# ---- On several ranks ----


@on_ranks(2)
@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_on_one_rank_only(policy: str) -> None:
    """All ranks take part: another rank's shard still trains."""
    mesh, rank = world_mesh("dp"), dist.get_rank()
    whole = random_grad(4, 6)
    params = [dtensor_param(whole, mesh, [Shard(0)]) for _ in range(2)]
    with torch.no_grad():
        for param in params:
            param.copy_(torch.distributed.tensor.distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    if rank == 1:
        params[1].requires_grad_(False)
        params[1].grad = None
    reports = [GradClipper([("adapter.base", param)], POLICIES[policy]).clip() for param in params]
    kept = [whole, torch.cat([whole[:2], torch.zeros(2, 6)])]
    for report, grad in zip(reports, kept, strict=True):
        norms = grad.double().norm(dim=1) if policy == "row" else grad.double().norm().view(1)
        torch.testing.assert_close(report.norms[: len(norms)], norms)
    if "weights" in policy or policy == "row":
        torch.testing.assert_close(reports[0].bounds, reports[1].bounds)


@on_ranks(2)
def test_frozen_everywhere_under_fsdp2() -> None:
    mesh = world_mesh("dp")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    for part in model:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 8)).sum().backward()
    clipper = GradClipper(model, distclip.agc(0.01))
    clipper.clip()
    assert {name.split("[")[0] for name in clipper.slots} == {"1.weight", "1.bias"}


@on_ranks(2)
def test_layouts_of_frozen_parameters_need_no_description() -> None:
    """A bare FSDP1 parameter shows no layout, which only matters once it trains."""
    model = FullyShardedDataParallel(mlp(5, 7, 3), device_id=torch.device("cpu"), use_orig_params=True)
    model.requires_grad_(False)
    mesh = world_mesh("pp")
    param = plain_param(torch.full((4,), 10.0))
    tagged = tagged_param(torch.ones(3), tensor_model_parallel=True)
    tagged.requires_grad_(False)
    tagged.grad = None
    everything = [("param", param), ("tagged", tagged), *model.named_parameters()]
    for _ in range(2):
        param.grad = torch.full((4,), 10.0)
        norm = distclip.clip_grad_norm_(everything, 1.0, split_over=mesh["pp"])
        torch.testing.assert_close(norm, torch.tensor(800**0.5))
    clipper = GradClipper(everything, distclip.agc(), split_over=mesh["pp"])
    clipper.clip()
    model.requires_grad_()
    backward(model, 5)
    for clip in (
        lambda: distclip.clip_grad_norm_(everything, 1.0, split_over=mesh["pp"]),
        clipper.clip,
    ):
        assert_raises_on_ranks(clip, distclip.LayoutError, "FSDP1", unchanged=param.grad)


# ---- Names ----


def chained() -> list[tuple[str, nn.Parameter]]:
    """Make two modules whose parameters have equal names."""
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    one.weight.grad, two.weight.grad = torch.full((4, 4), 1.0), torch.full((4, 4), 10.0)
    return list(itertools.chain(one.named_parameters(), two.named_parameters()))


@pytest.mark.parametrize("policy", ["model, by weights", "group", "tensor", "row"])
def test_two_parameters_with_one_name_are_refused(policy: str) -> None:
    rule = distclip.group_norm({"w": {"pattern": "weight", "max_norm": 1.0}}) if policy == "group" else POLICIES[policy]
    with pytest.raises(ArgumentError, match="weight"):
        GradClipper(chained(), rule)


def test_one_norm_of_everything_needs_no_names() -> None:
    named = chained()
    norm = distclip.clip_grad_norm_(named, 1.0)
    assert float(norm) == pytest.approx((16 + 1600) ** 0.5)
    clipper = GradClipper(chained(), distclip.global_norm(1.0))
    assert float(clipper.clip().norm) == pytest.approx((16 + 1600) ** 0.5)
    with pytest.raises(ArgumentError, match="weight"):
        clipper.measure_tensors()


@on_ranks(2)
def test_two_parameters_with_one_name_on_one_rank() -> None:
    mesh = world_mesh("pp")
    named = chained() if dist.get_rank() == 1 else chained()[:1]
    assert_raises_on_ranks(
        lambda: GradClipper(named, distclip.per_tensor_norm(1.0), split_over=mesh["pp"]), ArgumentError, "weight"
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_scaler_unscales_one_of_two_parameters_with_one_name(enabled: bool) -> None:
    named = chained()
    optimizers = [torch.optim.SGD([param], lr=1.0) for _, param in named]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
    scaler.scale(torch.ones(1))
    clipper = GradClipper(named, distclip.global_norm(1e9))
    if enabled:
        scaler.unscale_(optimizers[0])
    before = [param.detach().clone() for _, param in named]
    clipper.step(optimizers, scaler)
    factor = 4.0 if enabled else 1.0
    moved = [float((old - param.detach()).mean()) for old, (_, param) in zip(before, named, strict=True)]
    assert moved == pytest.approx([1.0 / factor, 10.0 / factor], rel=1e-4)


# ---- What is no parameter ----


@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "GradClipper"])
def test_gradients_in_place_of_parameters_are_reported(call: str) -> None:
    gradients = [torch.ones(3), torch.ones(2)]
    with pytest.warns(UserWarning, match="not their gradients"):
        clip(call, gradients)


@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "GradClipper"])
@pytest.mark.parametrize("kind", [iter, lambda ps: (p for p in ps), lambda ps: filter(None, ps), itertools.chain])
def test_exhausted_iterators_are_reported(call: str, kind: Any) -> None:
    parameters = kind([])
    with pytest.warns(UserWarning, match="empty generator"):
        clip(call, parameters)


@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "GradClipper"])
def test_nothing_is_reported_without_a_reason(call: str) -> None:
    """A rank may have no parameters, frozen ones only, or none with a gradient."""
    clip(call, [])
    clip(call, [freeze(torch.ones(2))])
    clip(call, [nn.Parameter(torch.ones(2))])
    clip(call, [torch.ones(2, requires_grad=True)])


def clip(call: str, parameters: Any) -> None:
    if call == "GradClipper":
        GradClipper(parameters, distclip.global_norm(1.0))
    elif call == "clip_grads_with_norm_":
        distclip.clip_grads_with_norm_(parameters, 1.0, torch.tensor(2.0))
    else:
        getattr(distclip, call)(parameters, 1.0)
