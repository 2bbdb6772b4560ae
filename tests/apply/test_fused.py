"""Step optimizers: fused kernels that scale or skip by themselves, and clipping attached to an optimizer."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip import ArgumentError, GradClipper, NonFiniteWarning, devices
from distclip.apply.fused import fused_step, supports_grad_scale
from distclip.policies import NormSpec, Verdict
from tests.ranks import on_ranks
from tests.rig import LOSS_SCALE, build_rig, make_scaler, record_warnings, to_bytes, training_state
from tests.tables.optimizers import FUSED

each_fused_optimizer = pytest.mark.parametrize("kind", FUSED)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def fill(model: nn.Module, step: int, factor: float = 1.0) -> None:
    """Set the gradients of a step."""
    torch.manual_seed(step)
    for param in model.parameters():
        param.grad = (torch.randn(param.shape) * factor).to(param.dtype)


def state_bytes(model: nn.Module, optimizer: Optimizer) -> list[bytes]:
    return to_bytes([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@each_fused_optimizer
def test_fused_kernel_divides_by_grad_scale(kind: str) -> None:
    one, two = make_model(), make_model()
    fused, unfused = FUSED[kind].make(one.parameters()), FUSED[kind].make(two.parameters(), fused=False)
    assert supports_grad_scale(fused)
    assert not supports_grad_scale(unfused)
    for step in range(4):
        fill(one, step)
        fill(two, step)
        with fused_step([fused], scalar(1 / 0.3), scalar(0.0)):
            fused.step()
        for param in two.parameters():
            param.grad.mul_(0.3)
        unfused.step()
        assert not hasattr(fused, "grad_scale")
        assert not hasattr(fused, "found_inf")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_fused_optimizer
def test_fused_kernel_skips_by_found_inf(kind: str) -> None:
    model = make_model()
    optimizer = FUSED[kind].make(model.parameters())
    fill(model, 0)
    optimizer.step()
    before = state_bytes(model, optimizer)
    fill(model, 1, float("nan"))
    with fused_step([optimizer], None, scalar(1.0)):
        optimizer.step()
    assert state_bytes(model, optimizer) == before
    with fused_step([optimizer], scalar(2.0), scalar(1.0)):
        optimizer.step()
    assert state_bytes(model, optimizer) == before
    fill(model, 2)
    with fused_step([optimizer], None, scalar(0.0)):
        optimizer.step()
    assert state_bytes(model, optimizer) != before


def test_removes_attributes_if_the_step_raises() -> None:
    model = make_model()
    optimizer, clipper = AdamW(model.parameters(), fused=True), GradClipper(model, distclip.global_norm(1.0))
    scales = []

    def fail(*_: Any) -> None:
        scales.append(float(optimizer.grad_scale))
        raise KeyError("in the step")

    hook = optimizer.register_step_pre_hook(fail)
    scaler = make_scaler()
    fill(model, 0, LOSS_SCALE)
    with pytest.raises(KeyError, match="in the step"):
        clipper.step(optimizer, scaler)
    assert len(scales) == 1
    assert scales[0] > LOSS_SCALE
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    hook.remove()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_fused_float32_optimizers_scale_by_themselves(options: dict[str, bool], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer, clipper = AdamW(model.parameters(), **options), GradClipper(model, distclip.global_norm(1.0))
    has_scale = []
    optimizer.register_step_pre_hook(lambda *_: has_scale.append(getattr(optimizer, "grad_scale", None) is not None))
    scaler = make_scaler()
    fill(model, 0, LOSS_SCALE)
    clipper.step(optimizer, scaler)
    scaler.update()
    fill(model, 1)
    clipper.step(optimizer)
    assert has_scale == [bool(options.get("fused")) and dtype is torch.float32, False]


@on_ranks(2)
def test_fused_optimizer_steps_dtensors_as_an_unfused_one_does() -> None:
    rigs = [build_rig("fsdp2"), build_rig("fsdp2")]
    for rig, kind in zip(rigs, ("fused", "adamw"), strict=True):
        optimizer, clipper, scaler = rig.optimizer(kind), rig.clipper(distclip.global_norm(1.0)), make_scaler()
        for step in range(4):
            rig.fill(step, LOSS_SCALE)
            if step == 2:
                rig.poison(1, float("inf"))
            before = training_state(rig, optimizer)
            skipped = bool(clipper.step(optimizer, scaler).skipped)
            assert skipped == (step == 2) == (training_state(rig, optimizer) == before)
            scaler.update(LOSS_SCALE)
    pairs = zip(rigs[0].named, rigs[1].named, strict=True)
    for (_, one), (_, two) in pairs:
        torch.testing.assert_close(one.to_local(), two.to_local(), rtol=1e-6, atol=1e-7)


@on_ranks(2)
@pytest.mark.parametrize("scaled", [False, True])
def test_deferred_host_reads_report_one_step_later(scaled: bool) -> None:
    """Compare with a clipper as on an accelerator, whose host reads a skip at the next step."""
    rigs = [build_rig("stages"), build_rig("stages")]
    optimizers = [rig.optimizer("fused") for rig in rigs]
    clippers = [rig.clipper(distclip.zclip(warmup=2), max_skips=2) for rig in rigs]
    scalers = [make_scaler() if scaled else None for _ in rigs]
    by_step: list[list[tuple[int, bool, int]]] = [[], []]
    for step, bad in enumerate((False, False, True, False, True, True)):
        for rig, optimizer, clipper, scaler in zip(rigs, optimizers, clippers, scalers, strict=True):
            rig.fill(step, scaler.get_scale() if scaler else 1.0)
            if bad:
                rig.poison(1, float("nan"))
            try:
                call = partial(clipper.step, optimizer, scaler)
                with mock.patch.object(devices, "host_reads_free", return_value=rig is rigs[0]):
                    (report, messages), raised = record_warnings(call), False
            except distclip.TooManySkippedSteps:
                raised = True
            assert raised == (step == 5 and rig is rigs[0])
            if not raised:
                assert bool(report.skipped) == bad
                by_step[rig is rigs[1]].append((step, bool(messages), clipper.skipped))
            if scaler and not raised:
                scaler.update()
        pairs = zip(rigs[0].named, rigs[1].named, strict=True)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for (_, a), (_, b) in pairs)
    # A skipped step is no surprise under a scaler.
    warns = not scaled
    assert by_step[0] == [(0, False, 0), (1, False, 0), (2, warns, 1), (3, False, 1), (4, warns, 2)]
    assert by_step[1] == [(0, False, 0), (1, False, 0), (2, False, 0), (3, warns, 1), (4, False, 1), (5, warns, 2)]
    # A checkpoint must not lose the step that the host has not read yet.
    with pytest.raises(distclip.TooManySkippedSteps) as caught:
        clippers[1].state_dict()
    assert "step 6: 2 steps in a row" in str(caught.value)
    assert "weight (1 NaN on rank 1)" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["step", "clip_grad_norm_"])
def test_compiled_training_is_the_same(function: str) -> None:
    models = [make_model(), make_model()]
    data = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))

    def train(model: nn.Module, compiled: bool) -> None:
        optimizer, clipper = AdamW(model.parameters(), lr=0.01), GradClipper(model, distclip.global_norm(0.1))

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if function == "step":
                return clipper.step(optimizer).norm
            norm = distclip.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            return norm

        run = torch.compile(step, backend="eager") if compiled else step
        assert all(run(x) > 0.1 for x in data)

    with warnings.catch_warnings():
        # Dynamo warns of code that it does not trace.
        warnings.simplefilter("ignore")
        train(models[0], compiled=True)
    train(models[1], compiled=False)
    torch._dynamo.reset()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def make_clipper(model: nn.Module, **options: Any) -> GradClipper:
    return GradClipper(model, distclip.global_norm(1.0), **options)


def test_attached_clipper_clips_once_per_step_of_all_optimizers_until_removed() -> None:
    one, two = make_model(), make_model()
    parts = [list(one[0].parameters()), list(one[2].parameters())]
    optimizers = [SGD(parts[0], lr=0.1), SGD(parts[1], lr=0.1)]
    clipper, other = make_clipper(one), make_clipper(two)
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
    assert clipper.state_dict()["counts"]["steps"] == 4, "clipped by the call, and once more in the hook"
    assert to_bytes(one.parameters()) == to_bytes(two.parameters())
    handle.remove()
    fill(one, 4)
    grads = to_bytes(p.grad for p in one.parameters())
    optimizers[0].step()
    assert to_bytes(p.grad for p in one.parameters()) == grads


def test_attach_needs_an_optimizer() -> None:
    with pytest.raises(ArgumentError, match="optimizer"):
        make_clipper(make_model()).attach()
    with pytest.raises(ArgumentError, match="optimizer"):
        make_clipper(make_model()).attach("adam")  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [True, False])
def test_attached_clipper_refuses_scaled_gradients_of_fused_optimizers(fused: bool) -> None:
    """Step through a scaler, which passes the scale to a fused optimizer and unscales for any other."""
    model = make_model()
    optimizer = AdamW(model.parameters(), fused=fused)
    make_clipper(model).attach(optimizer)
    fill(model, 0, LOSS_SCALE)
    scaler = make_scaler()
    if fused:
        with pytest.raises(ArgumentError, match=r"clipper\.step\(optimizer, scaler\)"):
            scaler.step(optimizer)
    else:
        scaler.step(optimizer)
        assert max(float(p.grad.norm()) for p in model.parameters()) <= 1


@pytest.mark.parametrize("method", ["step", "attach"])
def test_scheduler_counts_steps_that_were_not_skipped(method: str) -> None:
    """Accumulate two micro-batches, the first with a NaN: the step is skipped, and so is the scheduler's."""
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    clipper = make_clipper(model)
    if method == "attach":
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
            # An attached clipper returns no report, so its counter is compared.
            num_skipped = clipper.skipped
            skipped = bool(clipper.step(optimizer).skipped) if method == "step" else None
            if method == "attach":
                optimizer.step()
                skipped = clipper.skipped > num_skipped
        unchanged = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert unchanged == skipped == (step == 1) == bool(caught)
        assert all(w.category is NonFiniteWarning for w in caught), [str(w.message) for w in caught]
        if not skipped:
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.5, 0.25, 0.125]
    assert clipper.skipped == 1


def test_clips_main_grad_and_hides_it_on_a_skipped_step() -> None:
    """Clip Megatron's float32 gradient of a bfloat16 parameter."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.main_grad = torch.tensor([3.0, 4.0])
    clipper = GradClipper([("weight", weight)], distclip.global_norm(1.0))
    assert float(clipper.clip().norm) == 5.0
    torch.testing.assert_close(weight.main_grad, torch.tensor([0.6, 0.8]))
    weight.main_grad = torch.tensor([float("nan"), 4.0])
    with pytest.warns(NonFiniteWarning, match="1 NaN"):
        report = clipper.clip()
    assert report.skipped
    assert weight.main_grad is None or bool(weight.main_grad.isfinite().all()), "an optimizer would read the NaN"


def test_attaching_twice_raises() -> None:
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


class HalvingPolicy:
    """A policy that is no dataclass, so that its repr is an address, which differs between ranks."""

    spec = NormSpec()

    def init(self, slots: int, device: torch.device) -> dict[str, Tensor]:
        return {}

    def decide(self, totals: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        return Verdict(torch.full_like(totals.norms, 0.5)), state


@on_ranks(2)
def test_takes_a_policy_of_the_caller() -> None:
    weight = nn.Parameter(torch.zeros(2))
    # These move the addresses of later objects.
    padding = [object() for _ in range(1000 * dist.get_rank())]
    clipper = GradClipper([weight], HalvingPolicy(), split_over=dist.group.WORLD)
    weight.grad = torch.ones(2)
    clipper.clip()
    assert torch.equal(weight.grad, torch.full((2,), 0.5))
    assert len(padding) % 1000 == 0
