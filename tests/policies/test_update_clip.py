"""Update clipping against StableAdamW in float64 on whole tensors, in layouts and in every way to step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import ArgumentError, GradClipper, reference, update_clip
from distclip.norms.reduce import Totals
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import Rig, build_rig
from tests.tables.layouts.data_parallel import mlp

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.95), 1e-8, 0.1
FACTORS = (1.0, 0.5, *[1.0] * 18, 30.0, 1.0)
"""Sizes of the gradients, step by step."""


class StableAdamW:
    """The algorithm on one whole tensor, in float64."""

    def __init__(self, weight: Tensor, max_rms: float = 1.0, recovery: float = 1.0) -> None:
        self.weight, self.max_rms, self.recovery = weight.detach().double().clone(), max_rms, recovery
        self.first, self.second, self.steps = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0
        self.all_rms: list[float] = []

    def step(self, grad: Tensor) -> float:
        """Step, and return the coefficient of the learning rate."""
        grad, (beta1, beta2) = grad.double(), BETAS
        self.steps += 1
        rms = reference.update_rms(grad, self.second, beta2, self.steps)
        coef = 1.0
        if rms and self.steps > 1:
            self.all_rms.append(rms)
            coef = reference.update_coefficients(self.all_rms, beta2, self.max_rms, self.recovery)[-1]
        self.first = beta1 * self.first + (1 - beta1) * grad
        self.second = beta2 * self.second + (1 - beta2) * grad.square()
        root = (self.second / (1 - beta2**self.steps)).sqrt() + EPS
        self.weight -= coef * LR * (DECAY * self.weight + self.first / (1 - beta1**self.steps) / root)
        return coef


def adamw(params: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, LR, BETAS, EPS, DECAY, **options)


@on_ranks(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "megatron", "zero"])
def test_layouts(name: str) -> None:
    rig, module = build_rig("fsdp2" if name in ("ddp", "zero") else name), None
    if name in ("ddp", "zero"):
        module = nn.parallel.DistributedDataParallel(mlp(8, 6, 4))
        rig = Rig(list(module.module.named_parameters()), "2.weight")
    params = [param for _, param in rig.named]
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "foreach": False}
    optimizer: Any = adamw(params, foreach=False)
    if name == "zero":
        optimizer = _zero(params, **options)
    clipper = rig.clipper(update_clip(1.0)) if module is None else GradClipper(module, update_clip(1.0))
    whole = rig.gather_whole(lambda param: param)
    # A tagged tensor is one tensor in pieces, which have the same coefficient.
    tensors = {key.split("@")[0]: [k for k in whole if k.split("@")[0] == key.split("@")[0]] for key in whole}
    twins = {key: StableAdamW(torch.cat([whole[k] for k in keys])) for key, keys in tensors.items()}
    for step, factor in enumerate(FACTORS):
        rig.fill(step, factor)
        grads = rig.gather_whole(lambda param: param.grad)
        with CommDebugMode() as counter:
            report = clipper.step(optimizer)
        expected = {key: twin.step(torch.cat([grads[k] for k in tensors[key]])) for key, twin in twins.items()}
        # The optimizer of ZeRO broadcasts parameters.
        assert counter.get_total_counts() == 1 or step == 0 or name == "zero"
        for slot, coef in zip(clipper.slots, report.coefs, strict=True):
            assert float(coef) == pytest.approx(expected[slot.removeprefix("module.")], rel=1e-5)
        assert len(set(gather_from_ranks(report.coefs.numpy().tobytes()))) == 1
        assert float(report.coefs.max()) < 0.6 or factor < 30
        after = rig.gather_whole(lambda param: param)
        for key, twin in twins.items():
            torch.testing.assert_close(torch.cat([after[k] for k in tensors[key]]), twin.weight, rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_zero_needs_a_clipper_of_all_ranks() -> None:
    """Refuse a clipper of plain tensors, which adds nothing up, with moments that are spread over ranks."""
    params = list(mlp(8, 6, 4).parameters())
    optimizer: Any = _zero(params)
    for param in params:
        param.grad = torch.ones_like(param)
    clipper = GradClipper(params, update_clip(per="model"))
    with pytest.raises(ArgumentError, match="DistributedDataParallel"):
        clipper.step(optimizer)


def _zero(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        # The package compiles functions that it deprecates itself.
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, **options)


@pytest.mark.parametrize("way", ["step", "finish", "attach", "clip", "fused", "scaler", "closure", "measured"])
def test_ways_to_step(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer, twins = adamw(model.parameters(), fused=way == "fused"), {}
    twins = {name: StableAdamW(param, 1.5) for name, param in model.named_parameters()}
    clipper = GradClipper(model, update_clip(1.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if way == "scaler" else None
    if way in ("attach", "closure"):
        clipper.attach(optimizer)
    if way == "measured":
        clipper.measure_tensors()
    for step, factor in enumerate(FACTORS):
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)) * factor

        def backward(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if way != "closure":
            backward()
        if way == "finish":
            clipper.start(optimizer)
            clipper.finish(optimizer)
        elif way == "clip":
            clipper.clip(optimizer)
            if factor == max(FACTORS):
                clipper.clip(optimizer)  # without a step in between, only the last one holds
            optimizer.step()
        elif way in ("attach", "closure"):
            optimizer.step(backward if way == "closure" else None)  # type: ignore[call-overload]
        else:
            clipper.step(optimizer, scaler)
        scale = 1.0 if scaler is None else scaler.get_scale()
        if scaler is not None:
            scaler.update()
        for name, param in model.named_parameters():
            assert param.grad is not None
            unscaled = 1.0 if scale == 1.0 or float(param.grad.abs().max()) < 100 else scale
            twins[name].step(param.grad / unscaled)
            torch.testing.assert_close(param.detach().double(), twins[name].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("later", ["step", "clip", "start", "attach"])
def test_a_clip_without_a_step_leaves_nothing_for_the_next_one(later: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer, twin = adamw([weight]), StableAdamW(weight)
    clipper = GradClipper([("weight", weight)], update_clip(1.0))
    for factor in (*[1.0] * 14, 50.0):
        weight.grad = factor * torch.randn(4, 3)
        grad = weight.grad.clone()
        # A generator gives its optimizers once.
        assert float(clipper.clip(one for one in [optimizer]).coef) < 0.9 or factor < 50
        if later == "step":
            clipper.step(optimizer)
        elif later == "clip":
            clipper.clip(optimizer)
            optimizer.step()
        elif later == "start":
            clipper.start(optimizer)
            clipper.finish(optimizer)
        else:
            handle = clipper.attach(optimizer)
            optimizer.step()
            handle.remove()
        twin.step(grad)
        torch.testing.assert_close(weight.detach().double(), twin.weight, rtol=1e-5, atol=1e-6)


def test_rows_that_return_do_not_dominate_a_tensor() -> None:
    table = nn.Parameter(torch.ones(100, 4))
    optimizer, clipper = adamw([table]), GradClipper([("table", table)], update_clip())
    for _ in range(20):
        table.grad = torch.ones(100, 4)
        table.grad[0] = 0.0
        clipper.step(optimizer)
    table.grad = torch.ones(100, 4)
    assert float(clipper.step(optimizer).coefs) > 0.9


@given(
    trace=st.lists(st.floats(0.05, 40.0), min_size=1, max_size=30),
    beta=st.sampled_from([0.9, 0.99, 0.999]),
    recovery=st.sampled_from([0.0, 0.3, 1.0, 7.0]),
)
def test_rule_equals_its_twin(trace: list[float], beta: float, recovery: float) -> None:
    """Compare one slot with a loop over floats, next to a slot without second moments."""
    policy = update_clip(recovery=recovery)
    state = policy.init(2, torch.device("cpu"))
    expected = reference.update_coefficients(trace, beta, recovery=recovery)
    for rms, coef in zip(trace, expected, strict=True):
        sums = torch.tensor([[6 * rms**2, 0.0], [6.0, 0.0], [6 * (1 - beta), 0.0]], dtype=torch.float64)
        powers = torch.ones(2, dtype=torch.float64)
        totals = Totals(powers, update_powers=sums[0], update_counts=sums[1], update_rates=sums[2])
        verdict, state = policy.decide(totals, state)
        assert verdict.coefs.tolist() == pytest.approx([coef, 1.0], rel=1e-9)
        assert verdict.bounds is not None
        assert bool((verdict.bounds >= verdict.coefs).all())


@pytest.mark.parametrize("recovery", [0.0, 1.0])
@pytest.mark.parametrize("stays", [True, False])
def test_coefficients_return(recovery: float, stays: bool) -> None:
    """Follow gradients that become larger, for good or for one step, through a checkpoint."""
    weight = nn.Parameter(torch.ones(4))
    optimizer, coefs = torch.optim.Adam([weight], 1e-3, (0.9, 0.98)), []
    clipper = GradClipper([("weight", weight)], update_clip(recovery=recovery))
    for step in range(100):
        weight.grad = torch.full((4,), 100.0 if step == 60 or (step > 60 and stays) else 1.0)
        if step == 70:
            saved = clipper.state_dict()
            clipper = GradClipper([("weight", weight)], update_clip(recovery=recovery))
            clipper.load_state_dict(saved)
        coefs.append(float(clipper.step(optimizer).coefs))
    assert min(coefs[:60]) > 0.99999
    assert coefs[60] < 0.2
    rises = [after - before for before, after in zip(coefs[60:], coefs[61:], strict=False)]
    if not recovery:
        assert rises[0] > (0.05 if stays else 0.5)
    elif stays:
        # RMS is above 1.5 for 22 steps.
        assert rises[:20] == pytest.approx([0.02] * 20, rel=1e-5)
    else:
        assert rises[:16] == pytest.approx([0.05] * 16, rel=1e-5)


def test_no_warning_about_frequent_clipping() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer, clipper = adamw([weight]), GradClipper([("weight", weight)], update_clip(0.5, recovery=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(130):
            weight.grad = torch.ones(4)
            assert float(clipper.step(optimizer).coefs) < 1 or clipper.steps == 1


def test_updates_that_are_usual_for_a_tensor_are_left_alone() -> None:
    trace = [1.0, 2.9, *[1.8] * 200, 5.0, 1.8, 6.0, 1.8]
    coefs = reference.update_coefficients(trace, 0.999)
    assert set(coefs[:-2]) == {1.0}
    assert coefs[-2] == pytest.approx(1 / 6)
    assert max(reference.update_coefficients(trace, 0.999, recovery=0)[1:]) < 0.6


def test_a_spike_that_is_skipped_skips_no_later_step() -> None:
    weight = nn.Parameter(torch.ones(4))
    policy = distclip.NormPolicy(update_clip().threshold, per="tensor", skip=True)
    optimizer, clipper, skipped = adamw([weight]), GradClipper([("weight", weight)], policy), []
    for factor in (*[1.0] * 14, 100.0, 1.0, 1.0):
        weight.grad = factor * torch.ones(4)
        skipped.append(bool(clipper.step(optimizer).skipped))
    assert skipped == [*[False] * 14, True, False, False]


def test_skip_and_exclude() -> None:
    weight, bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    named = [("weight", weight), ("bias", bias)]
    policy = distclip.NormPolicy(update_clip(1.5).threshold, per="tensor", exclude="bias", skip=True)
    optimizer, clipper = adamw([weight, bias]), GradClipper(named, policy)
    for factor in (*[1.0] * 14, 100.0):
        before = weight.detach().clone(), bias.detach().clone()
        for _, param in named:
            param.grad = factor * torch.ones(4)
        report = clipper.step(optimizer)
        assert bool(report.skipped) == (factor == 100.0)
        assert torch.equal(bias.detach(), before[1]) == (factor == 100.0)
    clipper = GradClipper(named, update_clip(1.5, exclude="bias"))
    coefs = dict(zip(clipper.slots, clipper.step(optimizer).coefs.tolist(), strict=True))
    assert coefs["bias"] == 1.0 > coefs["weight"]


def test_squares_beyond_float32_do_not_move_a_tensor() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer, clipper = adamw([weight]), GradClipper([weight], update_clip())
    for size in (1.0, 1e30):
        before = weight.detach().clone()
        weight.grad = size * torch.ones(4)
        clipper.step(optimizer)
    assert torch.equal(weight.detach(), before)


def _of(policy: Any, **options: Any) -> GradClipper:
    weight = nn.Parameter(torch.ones(4, 2))
    weight.grad = torch.ones(4, 2)
    return GradClipper([("weight", weight)], policy, **options)


REFUSED: dict[str, tuple[str, Any]] = {
    "clip without the optimizer": ("clipper.step", lambda: _of(update_clip()).clip()),
    "start without the optimizer": ("clipper.start", lambda: _of(update_clip()).start()),
    "rows": ('per="tensor"', lambda: update_clip(per="row")),
    "a number": ("max_rms=0", lambda: update_clip(0.0)),
    "recovery": ("recovery=-1", lambda: update_clip(recovery=-1)),
    "isolated groups": ("isolate", lambda: _of(update_clip(per="model"), isolate=True)),
    "lagged": ("more than", lambda: distclip.lagged(update_clip())),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    match, make = REFUSED[name]
    with pytest.raises(ArgumentError, match=match):
        make()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizer_without_second_moments_is_refused(momentum: float) -> None:
    """Refuse SGD in its first step. It may never have a state, and a new Adam has none either."""
    weight = nn.Parameter(torch.ones(4))
    optimizer, clipper = torch.optim.SGD([weight], 0.1, momentum=momentum), GradClipper([weight], update_clip())
    weight.grad = torch.ones(4)
    with pytest.raises(ArgumentError, match="SGD has no second moments"):
        clipper.step(optimizer)


def test_optimizer_with_other_second_moments_is_refused_after_its_first_step() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer, clipper = torch.optim.Adamax([weight], 0.1), GradClipper([weight], update_clip())
    weight.grad = torch.ones(4)
    clipper.step(optimizer)
    with pytest.raises(ArgumentError, match="Adamax has no second moments"):
        clipper.step(optimizer)
    assert clipper.capturable() != True  # noqa: E712
