"""The optimizer's side of a step: factors that its kernel applies, steps that it leaves out, clipping inside of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import distclip
from distclip import ArgumentError, GradClipper, NonFiniteWarning
from distclip.apply.fused import fused_step, supports_grad_scale
from distclip.judge import Judge
from distclip.policies import NormSpec, Verdict
from tests.apply.test_grad_scaler import SCALE, scaler_of
from tests.ranks import World
from tests.rig import bits, build, frozen, quietly

KINDS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (Adam, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "amsgrad": True}),
    (SGD, {"lr": 0.01, "momentum": 0.9}),
]
# In torch 2.10 it says of itself that it does not take the factor.
if supports_grad_scale(Adagrad([torch.nn.Parameter(torch.zeros(1))], fused=True)):
    KINDS.append((Adagrad, {"lr": 0.01}))
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda x: getattr(x, "__name__", ""))


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def fill(model: nn.Module, step: int, factor: float = 1.0) -> None:
    torch.manual_seed(step)
    for param in model.parameters():
        param.grad = (torch.randn(param.shape) * factor).to(param.dtype)


def state_of(model: nn.Module, optimizer: Optimizer) -> list[bytes]:
    return bits([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])


def numbered(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@every_kind
def test_folding_is_multiplying(kind: type[Optimizer], options: dict[str, Any]) -> None:
    one, two = model_of(), model_of()
    folding, plainly = kind(one.parameters(), fused=True, **options), kind(two.parameters(), **options)
    assert supports_grad_scale(folding) and not supports_grad_scale(plainly)
    for step in range(4):
        fill(one, step)
        fill(two, step)
        with fused_step([folding], numbered(1 / 0.3), numbered(0.0)):
            folding.step()
        for param in two.parameters():
            param.grad.mul_(0.3)
        plainly.step()
        assert not hasattr(folding, "grad_scale") and not hasattr(folding, "found_inf")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every_kind
def test_step_left_out(kind: type[Optimizer], options: dict[str, Any]) -> None:
    model = model_of()
    optimizer = kind(model.parameters(), fused=True, **options)
    fill(model, 0)
    optimizer.step()
    before = state_of(model, optimizer)
    fill(model, 1, float("nan"))
    with fused_step([optimizer], None, numbered(1.0)):
        optimizer.step()
    assert state_of(model, optimizer) == before
    with fused_step([optimizer], numbered(2.0), numbered(1.0)):
        optimizer.step()
    assert state_of(model, optimizer) == before
    fill(model, 2)
    with fused_step([optimizer], None, numbered(0.0)):
        optimizer.step()
    assert state_of(model, optimizer) != before


def test_attributes_go_when_a_step_raises() -> None:
    model = model_of()
    optimizer, clipper = AdamW(model.parameters(), fused=True), GradClipper(model, distclip.global_norm(1.0))
    seen = []

    def fail(*_: Any) -> None:
        seen.append(float(optimizer.grad_scale))
        raise KeyError("in the step")

    hook = optimizer.register_step_pre_hook(fail)
    scaler = scaler_of()
    fill(model, 0, SCALE)
    with pytest.raises(KeyError, match="in the step"):
        clipper.step(optimizer, scaler)
    assert len(seen) == 1 and seen[0] > SCALE
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    hook.remove()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_gets_the_attributes(options: dict[str, bool], dtype: torch.dtype) -> None:
    model = model_of(dtype)
    optimizer, clipper = AdamW(model.parameters(), **options), GradClipper(model, distclip.global_norm(1.0))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(getattr(optimizer, "grad_scale", None) is not None))
    scaler = scaler_of()
    fill(model, 0, SCALE)
    clipper.step(optimizer, scaler)
    scaler.update()
    fill(model, 1)
    clipper.step(optimizer)
    assert seen == [bool(options.get("fused")) and dtype is torch.float32, False]


def check_fsdp2() -> None:
    """DTensors with a fused optimizer, folded, beside one that multiplies."""
    rigs = [build("fsdp2"), build("fsdp2")]
    for rig, kind in zip(rigs, ("fused", "adamw"), strict=True):
        optimizer, clipper, scaler = rig.optimizer(kind), rig.clipper(distclip.global_norm(1.0)), scaler_of()
        for step in range(4):
            rig.fill(step, SCALE)
            if step == 2:
                rig.poison(1, float("inf"))
            before = frozen(rig, optimizer)
            assert bool(clipper.step(optimizer, scaler).skipped) == (step == 2) == (frozen(rig, optimizer) == before)
            scaler.update(SCALE)
    pairs = zip(rigs[0].named, rigs[1].named, strict=True)
    for (_, one), (_, two) in pairs:
        torch.testing.assert_close(one.to_local(), two.to_local(), rtol=1e-6, atol=1e-7)


def test_fsdp2(world: Callable[[int], World]) -> None:
    world(2).run(check_fsdp2)


def check_deferred(scaled: bool) -> None:
    """As on an accelerator: the optimizers leave steps out by themselves, and the host hears of it one step later."""
    rigs = [build("stages"), build("stages")]
    optimizers = [rig.optimizer("fused") for rig in rigs]
    clippers = [rig.clipper(distclip.zclip(warmup=2), max_skips=2) for rig in rigs]
    scalers = [scaler_of() if scaled else None for _ in rigs]
    known: list[list[tuple[int, bool, int]]] = [[], []]
    on_host = Judge.on_host
    for step, bad in enumerate((False, False, True, False, True, True)):
        for rig, optimizer, clipper, scaler in zip(rigs, optimizers, clippers, scalers, strict=True):
            Judge.on_host = on_host if rig is rigs[0] else property(lambda _: False)  # type: ignore[assignment]
            rig.fill(step, scaler.get_scale() if scaler else 1.0)
            if bad:
                rig.poison(1, float("nan"))
            try:
                (report, said), raised = quietly(lambda c=clipper, o=optimizer, s=scaler: c.step(o, s)), False
            except distclip.TooManySkippedSteps:
                raised = True
            Judge.on_host = on_host  # type: ignore[method-assign]
            assert raised == (step == 5 and rig is rigs[0])
            if not raised:
                assert bool(report.skipped) == bad
                known[rig is rigs[1]].append((step, bool(said), clipper.skipped))
            if scaler and not raised:
                scaler.update()
        pairs = zip(rigs[0].named, rigs[1].named, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for (_, a), (_, b) in pairs)
    said = not scaled
    assert known[0] == [(0, False, 0), (1, False, 0), (2, said, 1), (3, False, 1), (4, said, 2)]
    assert known[1] == [(0, False, 0), (1, False, 0), (2, False, 0), (3, said, 1), (4, False, 1), (5, said, 2)]
    try:
        clippers[1].state_dict()
    except distclip.TooManySkippedSteps as error:
        assert "step 6: 2 steps in a row" in str(error) and "weight (1 NaN on rank 1)" in str(error), error
    else:
        raise AssertionError("what the host has not heard of yet was lost")


@pytest.mark.parametrize("scaled", [False, True])
def test_deferred(world: Callable[[int], World], scaled: bool) -> None:
    world(2).run(check_deferred, scaled=scaled)


@pytest.mark.parametrize("how", ["step", "clip_grad_norm_"])
def test_compiled(how: str) -> None:
    models = [model_of(), model_of()]
    data = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))

    def training(model: nn.Module, compiled: bool) -> None:
        optimizer, clipper = AdamW(model.parameters(), lr=0.01), GradClipper(model, distclip.global_norm(0.1))

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if how == "step":
                return clipper.step(optimizer).norm
            norm = distclip.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            return norm

        run = torch.compile(step, backend="eager") if compiled else step
        assert all(run(x) > 0.1 for x in data)

    with warnings.catch_warnings():
        # Dynamo's own, about what it does not trace.
        warnings.simplefilter("ignore")
        training(models[0], compiled=True)
    training(models[1], compiled=False)
    torch._dynamo.reset()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def counting(model: nn.Module, **options: Any) -> GradClipper:
    return GradClipper(model, distclip.global_norm(1.0), **options)


def test_attached() -> None:
    """Once in a turn of two optimizers, never twice, and not any more once removed."""
    one, two = model_of(), model_of()
    parts = [list(one[0].parameters()), list(one[2].parameters())]
    optimizers = [SGD(parts[0], lr=0.1), SGD(parts[1], lr=0.1)]
    clipper, other = counting(one), counting(two)
    reference = SGD(two.parameters(), lr=0.1)
    handle = clipper.attach(*optimizers)
    for turn in range(3):
        fill(one, turn)
        fill(two, turn)
        for optimizer in optimizers:
            optimizer.step()
        other.step(reference)
        assert clipper.state_dict()["counts"]["steps"] == turn + 1
    fill(one, 3)
    fill(two, 3)
    clipper.step(optimizers)
    other.step(reference)
    assert clipper.state_dict()["counts"]["steps"] == 4, "clipped by the call, and once more inside of it"
    assert bits(one.parameters()) == bits(two.parameters())
    handle.remove()
    fill(one, 4)
    grads = bits(p.grad for p in one.parameters())
    optimizers[0].step()
    assert bits(p.grad for p in one.parameters()) == grads


def test_attached_to_nothing() -> None:
    with pytest.raises(ArgumentError, match="optimizer"):
        counting(model_of()).attach()
    with pytest.raises(ArgumentError, match="optimizer"):
        counting(model_of()).attach("adam")  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [True, False])
def test_attached_with_scaler(fused: bool) -> None:
    """A fused optimizer is handed the scale in its step; with any other nobody can see it."""
    model = model_of()
    optimizer = AdamW(model.parameters(), fused=fused)
    counting(model).attach(optimizer)
    fill(model, 0, SCALE)
    scaler = scaler_of()
    if fused:
        with pytest.raises(ArgumentError, match=r"clipper\.step\(optimizer, scaler\)"):
            scaler.step(optimizer)
    else:
        scaler.step(optimizer)
        assert max(float(p.grad.norm()) for p in model.parameters()) <= 1


@pytest.mark.parametrize("how", ["step", "attach"])
def test_scheduler_and_accumulation(how: str) -> None:
    """A scheduler that counts updates only; a NaN in the first of two micro-batches skips both."""
    model = model_of()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    clipper = counting(model)
    if how == "attach":
        clipper.attach(optimizer)
    rates = []
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(2):
            factor = float("nan") if (step, micro) == (1, 0) else 1.0
            (model(torch.ones(2, 5)).sum() * factor).backward()
        before = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Attached, there is no report: what the clipper counts tells.
            skips = clipper.skipped
            skipped = bool(clipper.step(optimizer).skipped) if how == "step" else None
            if how == "attach":
                optimizer.step()
                skipped = clipper.skipped > skips
        stood = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert stood == skipped == (step == 1) == bool(caught)
        assert all(w.category is NonFiniteWarning for w in caught), [str(w.message) for w in caught]
        if not skipped:
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.5, 0.25, 0.125]
    assert clipper.skipped == 1


def test_main_grad() -> None:
    """Megatron's fp32 gradient beside a bfloat16 parameter: measured, clipped and, on a skipped step, out of reach."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.main_grad = torch.tensor([3.0, 4.0])
    clipper = GradClipper([("weight", weight)], distclip.global_norm(1.0))
    assert float(clipper.clip().norm) == 5.0
    torch.testing.assert_close(weight.main_grad, torch.tensor([0.6, 0.8]))
    weight.main_grad = torch.tensor([float("nan"), 4.0])
    with pytest.warns(NonFiniteWarning, match="1 NaN"):
        report = clipper.clip()
    assert report.skipped
    assert weight.main_grad is None or bool(weight.main_grad.isfinite().all()), "an optimizer would learn the NaN"


def test_attached_twice() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = GradClipper([weight], distclip.global_norm(1.0))
    handle = clipper.attach(optimizer)
    with pytest.raises(ArgumentError, match="clip twice"):
        clipper.attach(optimizer)
    handle.remove()
    clipper.attach(optimizer)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


class Rule:
    """A policy that is no dataclass: where it lies in memory differs from rank to rank."""

    spec = NormSpec()

    def init(self, slots: int, device: torch.device) -> dict[str, Tensor]:
        return {}

    def decide(self, totals: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        return Verdict(torch.full_like(totals.norms, 0.5)), state


def check_own_policy() -> None:
    weight = nn.Parameter(torch.zeros(2))
    kept = [object() for _ in range(1000 * dist.get_rank())]
    clipper = GradClipper([weight], Rule(), split_over=dist.group.WORLD)
    weight.grad = torch.ones(2)
    clipper.clip()
    assert torch.equal(weight.grad, torch.full((2,), 0.5)) and len(kept) % 1000 == 0


def test_own_policy(world: Callable[[int], World]) -> None:
    world(2).run(check_own_policy)
