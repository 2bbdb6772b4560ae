"""Accelerate on two ranks, against one process in float64 on the global batch."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.integrations.accelerate import attach
from tests.frameworks import skip_without
from tests.integrations.accelerate.integration import (
    LOSS_SCALE,
    Accelerate,
    build_accelerator,
    build_loader,
    prepare,
    run_loop,
)
from tests.integrations.one_process import (
    OUTLIER,
    POLICIES,
    bitwise_equal,
    build_net,
    check_equal_on_ranks,
    check_run,
    error_of,
    framework_environment,
    full_params,
    mse,
    poison,
    sgd,
)
from tests.ranks import gather_from_ranks, on_ranks, replicas_may_differ

skip_without("accelerate", reason="Accelerate is not installed: pip install 'distclip[hf]'")

KINDS = ["ddp", "fsdp2"]
"""FSDP1 does not start on a CPU, because Accelerate passes it a device that it refuses."""


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process(kind: str, policy: str) -> None:
    Accelerate().steps_as_one_process(kind, POLICIES[policy])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_accumulates_as_one_process(kind: str) -> None:
    Accelerate().steps_as_one_process(kind, POLICIES["model"], num_micro_batches=2)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("rule", ["skip", "raise"])
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_on_one_rank(kind: str, rule: str) -> None:
    Accelerate().nonfinite_on_one_rank(kind, rule)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_step_skipped_by_policy(kind: str) -> None:
    Accelerate().skipped_by_policy(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    Accelerate().checkpoint(kind, str(tmp_path))


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_input(kind: str) -> None:
    Accelerate().invalid_input(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_detach(kind: str) -> None:
    Accelerate().detach(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_is_unscaled_once_and_skips_an_overflow(fused: bool) -> None:
    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.02, fused=fused)

    policy = distclip.global_norm(0.5)
    with framework_environment(), replicas_may_differ():
        accelerator = build_accelerator("ddp", fp16=True)
        attachment = attach(accelerator, policy)
        prepared = prepare(accelerator, optimizer=adamw)
        steps = run_loop(accelerator, *prepared)
        norms = [step["norm"] for step in steps]
        check_run(steps[-1]["params"], norms, policy, fp16=True, optimizer=adamw)
        assert accelerator.scaler.get_scale() == LOSS_SCALE
        assert not any(step["skipped"] for step in steps)
        steps = run_loop(accelerator, *prepared, poisoned_step=OUTLIER)
    assert [step["skipped"] for step in steps] == [False, False, True, False, False]
    assert bitwise_equal(steps[1]["params"], steps[2]["params"])
    assert attachment.clipper is not None
    check_equal_on_ranks(accelerator.scaler.get_scale(), attachment.clipper.skipped)
    assert accelerator.scaler.get_scale() == LOSS_SCALE / 2
    assert attachment.clipper.skipped == 1


def prepare_two_optimizers(accelerator: Any) -> tuple[Any, Any, Any, Any]:
    """Return a prepared (model, optimizer of the first layer, optimizer of the last layer, loader)."""
    model = build_net()
    prepared: tuple[Any, Any, Any, Any] = accelerator.prepare(
        model, sgd(model.first.parameters()), sgd(model.last.parameters()), build_loader()
    )
    return prepared


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("attached", [False, True])
def test_two_optimizers_under_one_scaler(attached: bool) -> None:
    """Accelerate itself unscales the second optimizer twice."""
    policy = distclip.global_norm(0.5)
    with framework_environment():
        accelerator = build_accelerator("ddp", fp16=True)
        if attached:
            attach(accelerator, policy)
        model, *optimizers, loader = prepare_two_optimizers(accelerator)
        norms = []
        for x, y in loader:
            accelerator.backward(mse(model(x), y))
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    error = error_of(lambda: check_run(full_params(model), norms, policy, fp16=True))
    assert error == "" if attached else error.startswith("AssertionError")
    assert accelerator.scaler.get_scale() == LOSS_SCALE


@on_ranks(2, fixture="ranks")
def test_overflow_skips_both_of_two_optimizers() -> None:
    with framework_environment():
        accelerator = build_accelerator("ddp", fp16=True)
        attach(accelerator, distclip.global_norm(0.5))
        model, first, last, loader = prepare_two_optimizers(accelerator)
        before = full_params(model)
        x, y = next(iter(loader))
        accelerator.backward(mse(model(x), y))
        poison(model, None)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        first.step()
        last.step()
    assert bitwise_equal(before, full_params(model))
    assert first.step_was_skipped
    assert last.step_was_skipped
    check_equal_on_ranks(accelerator.scaler.get_scale())
    assert accelerator.scaler.get_scale() < LOSS_SCALE


@on_ranks(2, fixture="ranks")
def test_models_that_are_not_prepared_on_every_rank_are_refused() -> None:
    with framework_environment():
        accelerator = build_accelerator("ddp")
        attach(accelerator, distclip.global_norm(0.5))
        errors = gather_from_ranks(error_of(lambda: accelerator.clip_grad_norm_([], 1.0)))
        assert all("has prepared no model" in error for error in errors)
        model, _, _ = prepare(accelerator)
        if dist.get_rank() == 0:
            accelerator.prepare_model(build_net(), evaluation_mode=True)
        errors = gather_from_ranks(error_of(lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        assert all("have prepared [2, 1] models" in error for error in errors)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_one_all_reduce_per_step(kind: str) -> None:
    with framework_environment():
        accelerator = build_accelerator(kind)
        attach(accelerator, distclip.global_norm(0.5))
        model, optimizer, loader = prepare(accelerator)
        counts = []
        for x, y in loader:
            accelerator.backward(mse(model(x), y))
            with CommDebugMode() as counter:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            counts.append({str(op): n for op, n in counter.get_comm_counts().items()})
            optimizer.step()
            optimizer.zero_grad()
    # The first step gathers as well.
    assert all(len(step) == 1 for step in counts[1:]), counts
    assert all("allreduce" in op and n == 1 for step in counts[1:] for op, n in step.items()), counts


@on_ranks(2, fixture="ranks")
def test_local_sgd_clips_by_the_norm_of_each_process() -> None:
    from accelerate.local_sgd import LocalSGD

    with framework_environment():
        accelerator = build_accelerator("ddp")
        attach(accelerator, distclip.global_norm(0.01), comm=distclip.LocalComm())
        model, optimizer, loader = prepare(accelerator)
        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=3) as local_sgd:
            for x, y in loader:
                accelerator.backward(mse(model(x), y))
                expected = float(distclip.get_total_norm([p.grad for p in model.parameters()]))
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                clipped = float(distclip.get_total_norm([p.grad for p in model.parameters()]))
                assert float(norm) == expected
                assert clipped <= 0.01 + 1e-6 < expected
                assert len(set(gather_from_ranks(expected))) == 2
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
        assert len(set(gather_from_ranks(repr(full_params(model))))) == 1


@on_ranks(2, fixture="ranks")
def test_accelerate_itself_turns_an_infinite_gradient_into_nan() -> None:
    with framework_environment():
        accelerator = build_accelerator("ddp")
        model, _, loader = prepare(accelerator)
        x, y = next(iter(loader))

        def clip_to_infinity() -> Tensor:
            model.zero_grad()
            accelerator.backward(mse(model(x), y))
            poison(model, None, float("inf"))
            accelerator.clip_grad_norm_(model.parameters(), float("inf"))
            return torch.cat([param.grad.view(-1) for param in model.parameters()])

        assert int(clip_to_infinity().isnan().sum()) > 0
        attach(accelerator, distclip.global_norm(float("inf")), on_nonfinite="zero")
        assert bool(clip_to_infinity().isfinite().all())


@on_ranks(2, fixture="ranks")
def test_training_check_of_accelerate_with_clipping() -> None:
    """Accelerate's own `training_check` compares one process with all. Here `step` is clipped in both."""
    from accelerate.test_utils.scripts import test_script as script

    accelerators: list[Any] = []

    def attached(**options: Any) -> Any:
        accelerators.append(script.Accelerator(**options))
        attach(accelerators[-1], distclip.global_norm(0.5))
        return accelerators[-1]

    text = inspect.getsource(script.mock_training) + inspect.getsource(script.training_check)
    for backward, clip in {
        "accelerator.backward(loss)": "accelerator.clip_grad_norm_(model.parameters(), 0.5)",
        "loss.backward()": "torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)",
    }.items():
        assert backward in text
        text = re.sub(rf"^( *){re.escape(backward)}$", rf"\1{backward}\n\1{clip}", text, flags=re.MULTILINE)
    with framework_environment():
        build_accelerator("ddp")
        names = {**vars(script), "Accelerator": attached, "print": lambda *_: None}
        exec(text, names)
        names["training_check"]()
    assert len(accelerators) >= 2
    assert all(accelerator.num_processes == 2 for accelerator in accelerators)
    check_equal_on_ranks([accelerator.distclip.report.as_dict() for accelerator in accelerators])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("fp16", [False, True])
def test_models_in_turn_are_clipped_one_by_one(fp16: bool) -> None:
    """Train a generator through a discriminator, which keeps gradients of the generator's loss."""
    with framework_environment():
        accelerator = build_accelerator("ddp", fp16=fp16)
        attach(accelerator, distclip.global_norm(1.0))
        models = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        maker, judge, *optimizers = accelerator.prepare(*models, *(sgd(model.parameters()) for model in models))
        x = torch.full((2, 4), 1.0 + dist.get_rank())

        def train(model: Any, optimizer: Any, factor: float) -> None:
            optimizer.zero_grad()
            with torch.enable_grad():
                made = maker(x)
                accelerator.backward(factor * judge(made.detach() if model is judge else made).sum())
            others = [
                p.grad.clone()
                for one in (maker, judge)
                if one is not model
                for p in one.parameters()
                if p.grad is not None
            ]
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            own = torch.cat([param.grad.flatten() for param in model.parameters()])
            assert float(own.norm()) == pytest.approx(1.0, abs=1e-3)
            assert float(norm) > 1
            kept = [
                p.grad for one in (maker, judge) if one is not model for p in one.parameters() if p.grad is not None
            ]
            assert all(map(torch.equal, others, kept)), "a gradient of the other model was written"
            before = full_params(model)
            optimizer.step()
            assert not bitwise_equal(before, full_params(model))

        for _ in range(3):
            train(judge, optimizers[1], 3.0)
            train(maker, optimizers[0], -3.0)
        errors = error_of(lambda: accelerator.clip_grad_norm_(list(maker.parameters())[:1], 1.0))
        assert "were not passed" in errors
        check_equal_on_ranks(full_params(maker))
