"""Run the checks of `tests.tables.integrations` in a loop around an Accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip.integrations.accelerate import Attachment, attach, detach
from tests.integrations.one_process import (
    NUM_ROWS,
    OUTLIER,
    Samples,
    bitwise_equal,
    build_net,
    error_of,
    framework_environment,
    full_params,
    mse,
    poison,
    sgd,
)
from tests.integrations.training_loop import Run, TrainingLoop
from tests.ranks import gather_from_ranks

LOSS_SCALE = 1024.0


def reset_state() -> None:
    """Clear what Accelerate keeps in a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_", "PARALLELISM_CONFIG_"))]:
        del os.environ[name]


def claim_devices() -> None:
    """Let Accelerate believe that each process has a device, which is the CPU all the same.

    On a CPU it silently ignores its FSDP plugin and prepares DDP, and it refuses tensor parallelism.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def build_accelerator(kind: str, num_micro_batches: int = 1, *, fp16: bool = False) -> Any:
    """Build an Accelerator, in a process that has had others."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    reset_state()
    plugin = None
    if kind == "fsdp2":
        claim_devices()
        # Gathering full tensors fails on a CPU, where torch returns them before they have arrived.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
        )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=num_micro_batches, fsdp_plugin=plugin)
    if fp16:
        # On a CPU it makes no scaler.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)  # type: ignore[attr-defined]
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return accelerator


def is_prepared_as(model: Any, kind: str) -> bool:
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(model, {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}[kind])


def build_loader(num_micro_batches: int = 1) -> Any:
    return torch.utils.data.DataLoader(Samples(num_micro_batches), batch_size=NUM_ROWS)


def prepare(
    accelerator: Any, num_micro_batches: int = 1, optimizer: Callable[[Any], Any] = sgd
) -> tuple[Any, Any, Any]:
    """Return a prepared (model, optimizer, loader)."""
    model = build_net()
    prepared: tuple[Any, Any, Any] = accelerator.prepare(
        model, optimizer(model.parameters()), build_loader(num_micro_batches)
    )
    return prepared


def run_loop(
    accelerator: Any, model: Any, optimizer: Any, loader: Any, poisoned_step: int | None = None
) -> list[dict[str, Any]]:
    """Train by the loop of Accelerate's examples.

    Returns:
        {"norm", "skipped", "params"} of each step.
    """
    steps: list[dict[str, Any]] = []
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mse(model(x), y))
            if accelerator.sync_gradients and poisoned_step == len(steps):
                poison(model)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1e-9)
            assert (norm is None) == (not accelerator.sync_gradients)
            optimizer.step()
            optimizer.zero_grad()
        if norm is not None:
            skipped = accelerator.optimizer_step_was_skipped
            steps.append({"norm": float(norm), "skipped": skipped, "params": full_params(model)})
    return steps


class Accelerate(TrainingLoop):
    """An Accelerator with a policy attached."""

    def train(
        self,
        setting: str,
        policy: Any,
        *,
        num_micro_batches: int = 1,
        poisoned_step: int | None = None,
        on_nonfinite: Any = "skip",
    ) -> Run:
        accelerator = build_accelerator(setting, num_micro_batches)
        attachment = attach(accelerator, policy, on_nonfinite=on_nonfinite)
        assert accelerator.distclip is attachment
        model, optimizer, loader = prepare(accelerator, num_micro_batches)
        assert is_prepared_as(model, setting)
        scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1000))
        steps = run_loop(accelerator, model, optimizer, loader, poisoned_step)
        skipped = [step["skipped"] for step in steps]
        assert skipped == [attachment.clipper.skipped > 0 and i == OUTLIER for i in range(len(steps))]
        # A prepared scheduler waits after a skipped step, which sets this attribute.
        optimizer._is_overflow = True
        count = scheduler.scheduler._step_count
        scheduler.step()
        assert scheduler.scheduler._step_count == count
        return Run([step["norm"] for step in steps], [step["params"] for step in steps], attachment)

    def checkpoint(self, setting: str, folder: str) -> None:
        """Load before the first step or after it, and go on with the same bits."""
        policy, path = distclip.zclip(cap=1.0, warmup=1), os.path.join(folder, setting)

        def build() -> tuple[Any, Attachment, tuple[Any, Any, Any]]:
            accelerator = build_accelerator(setting)
            return accelerator, attach(accelerator, policy), prepare(accelerator)

        with framework_environment():
            accelerator, attachment, prepared = build()
            run_loop(accelerator, *prepared)
            accelerator.save_state(path)
            saved = attachment.state_dict()
            expected = run_loop(accelerator, *prepared)

            for before_first_step in (True, False):
                accelerator, resumed, prepared = build()
                if not before_first_step:
                    run_loop(accelerator, *prepared)
                accelerator.load_state(path)
                assert bitwise_equal(resumed.state_dict(), saved)
                steps = run_loop(accelerator, *prepared)
                assert [step["norm"] for step in steps] == [step["norm"] for step in expected]
                assert bitwise_equal(steps[-1]["params"], expected[-1]["params"])
                assert bitwise_equal(resumed.state_dict(), attachment.state_dict())

    def invalid_input(self, setting: str) -> None:
        """Pass wrong parameters on one rank only. Both ranks raise, and no gradient changes."""
        policy = distclip.global_norm(0.5)
        with framework_environment():
            accelerator = build_accelerator(setting)
            assert "expected a policy" in error_of(lambda: attach(accelerator, 1.0))  # type: ignore[arg-type]
            attach(accelerator, policy)
            assert "has a policy already" in error_of(lambda: attach(accelerator, policy))
            model, _, loader = prepare(accelerator)
            x, y = next(iter(loader))
            params = list(model.parameters())

            def errors_with(passed: list[Tensor]) -> list[str]:
                model.zero_grad()
                accelerator.backward(mse(model(x), y))
                before = [param.grad.clone() for param in params]
                on_this_rank = passed if dist.get_rank() == 1 else model.parameters()
                error = error_of(lambda: accelerator.clip_grad_norm_(on_this_rank, 1.0))
                assert not error or all(torch.equal(b, p.grad) for b, p in zip(before, params, strict=True))
                return gather_from_ranks(error)

            errors = errors_with(params[1:])
            assert all("first.weight" in error and "ArgumentError" in error for error in errors)
            errors = errors_with([*params, torch.zeros(2, requires_grad=True)])
            assert all("belong to no model" in error for error in errors)
            assert not any(errors_with(params))
            by_deepspeed = type("Accelerator", (), {"distributed_type": "DEEPSPEED"})()
            assert "deepspeed.attach" in error_of(lambda: attach(by_deepspeed, policy))

    def detach(self, setting: str) -> None:
        with framework_environment():
            accelerator = build_accelerator(setting)
            attachment = attach(accelerator, distclip.global_norm(0.5))
            model, optimizer, loader = prepare(accelerator)
            params, optimizer_step = list(model.parameters()), optimizer.step
            for policy_clips in (True, False):
                if not policy_clips:
                    detach(accelerator)
                x, y = next(iter(loader))
                model.zero_grad()
                accelerator.backward(mse(model(x), y))
                norm = accelerator.clip_grad_norm_(params, 0.01)
                clipped = float(distclip.get_total_norm([param.grad for param in params]))
                assert float(norm) > 0.01
                assert (clipped <= 0.01 + 1e-6) is not policy_clips
            assert optimizer.step == optimizer_step
            assert "nothing is attached" in error_of(lambda: detach(accelerator))
            assert not hasattr(accelerator, "distclip")
            assert not accelerator._custom_objects
            again = attach(accelerator, distclip.global_norm(0.5))
            assert again is accelerator.distclip is not attachment
