"""Run the checks of `tests.tables.integrations` in a DeepSpeed engine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import GradClipper, LocalComm, agc, global_norm, median_mad, value, zclip
from distclip.integrations.deepspeed import attach, config, detach
from tests.integrations.deepspeed.engines import (
    DTYPES,
    NAN,
    Setting,
    Uneven,
    backward,
    build_engine,
    full_fp32_params,
    micro_batches_of,
    same_params,
    sgd,
    step,
    warnings_and_error_of,
)
from tests.ranks import gather_from_ranks
from tests.tables.integrations import Integration


class OneProcess:
    """Training of the same model in one process.

    Float64 gradients are taken at parameters as the engine rounds them.
    """

    def __init__(self, model: nn.Module, policy: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = copy.deepcopy(model).double(), dtype
        with torch.no_grad():
            for param in self.model.parameters():
                # DeepSpeed starts from the model in its precision.
                param.copy_(param.to(dtype))
        self.optimizer = sgd(self.model.parameters())
        self.clipper = GradClipper(self.model, policy, comm=LocalComm())

    def step(self, x: Tensor, y: Tensor) -> Any:
        self.optimizer.zero_grad()
        rounded = {n: p.detach().to(self.dtype).double().requires_grad_() for n, p in self.model.named_parameters()}
        loss = (torch.func.functional_call(self.model, rounded, (x.double(),)) - y.double()).square().mean()
        grads = torch.autograd.grad(loss, list(rounded.values()), allow_unused=True)
        for param, grad in zip(self.model.parameters(), grads, strict=True):
            # DeepSpeed fills in zeros.
            param.grad = torch.zeros_like(param) if grad is None else grad
        return self.clipper.step(self.optimizer)

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.model.named_parameters()}


def global_batches(num_steps: int, num_micro_batches: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches with two rows per rank and micro-batch. Every rank makes the same ones, with an outlier."""
    generator = torch.Generator().manual_seed(1)
    num_rows = 2 * num_micro_batches * dist.get_world_size()
    batches = [[torch.randn(num_rows, n, generator=generator) for n in (13, 3)] for _ in range(num_steps)]
    return [(x, y * (8.0 if i == num_steps - 2 else 1.0)) for i, (x, y) in enumerate(batches)]


def relative_error(params: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return how much the updates differ, relative to all updates."""
    assert list(params) == list(expected)
    error = torch.cat([(params[n] - expected[n]).flatten() for n in params]).norm()
    return float(error / torch.cat([(expected[n] - start[n]).flatten() for n in params]).norm())


def policy_state(clipper: GradClipper) -> list[Tensor]:
    return [tensor for slot in clipper.state_dict()["state"].values() for tensor in slot.values()]


class DeepSpeed(Integration):
    """An engine with a policy attached."""

    def steps_as_one_process(
        self, setting: Setting, policy: Any, num_steps: int = 5, model: Callable[[], nn.Module] = Uneven
    ) -> None:
        torch.manual_seed(0)
        module, dtype = model(), DTYPES[setting.dtype]
        one_process = OneProcess(module, policy, dtype)
        start = {name: param.clone() for name, param in one_process.params.items()}
        engine = build_engine(module, setting, sgd)
        attachment = attach(engine, policy)
        for i, (x, y) in enumerate(global_batches(num_steps, setting.num_micro_batches)):
            for rows in micro_batches_of(x, y, setting.num_micro_batches):
                backward(engine, *rows, dtype)
                engine.step()
            expected, report = one_process.step(x, y), attachment.report
            assert report is not None
            shown = torch.as_tensor(engine.get_global_grad_norm())
            torch.testing.assert_close(
                torch.stack([report.norm.double(), report.coef.double(), shown]),
                torch.stack([expected.norm.double(), expected.coef.double(), expected.norm.double()]),
                rtol=setting.tolerance,
                atol=0,
                check_dtype=False,
                msg=lambda message, i=i: f"step {i}: {message}",
            )
            assert bool(report.clipped) == bool(expected.clipped), f"step {i}"
            bits = gather_from_ranks((report.norm.numpy().tobytes(), report.coefs.numpy().tobytes()))
            assert bits == [bits[0]] * len(bits)
        assert relative_error(full_fp32_params(engine), one_process.params, start) < setting.tolerance
        assert engine.skipped_steps == 0

    def nonfinite_on_one_rank(self, setting: Setting, rule: str = "") -> None:
        """Check one rule, or all of them on one engine, which saves the time to build it."""
        torch.manual_seed(0)
        engine = build_engine(Uneven(), setting, sgd)
        # "propagate" ruins the parameters.
        for one_rule in [rule] if rule else ["skip", "raise", "zero", "propagate"]:
            self._nonfinite_on_one_rank(engine, setting, one_rule)
            detach(engine)

    def _nonfinite_on_one_rank(self, engine: Any, setting: Setting, rule: Any) -> None:
        attachment = attach(engine, zclip(cap=1.0, warmup=1), on_nonfinite=rule)
        clipper, num_skipped = attachment.clipper, engine.skipped_steps
        step(engine, setting, 0)
        before, state = full_fp32_params(engine), policy_state(clipper)
        scale = attachment._adapter.loss_scale
        last_rank = dist.get_world_size() - 1
        messages, error = warnings_and_error_of(lambda: step(engine, setting, 1, NAN, last_rank))
        after, report = full_fp32_params(engine), attachment.report
        if rule == "raise" and scale is None:
            assert error.startswith("NonFiniteError: step 2: elements are not finite in")
            assert same_params(after, before)
            return
        assert error == ""
        assert report is not None
        skips = rule == "skip" or scale is not None
        if skips:
            assert same_params(after, before)
            assert engine.skipped_steps == num_skipped + 1
            assert not engine.was_step_applied()
            assert bool(report.skipped)
            assert not bool(report.finite)
            # The loss scaler finds its scale by such steps.
            assert len(messages) == (1 if scale is None else 0)
            assert clipper.skipped == 1
            assert all(map(torch.equal, state, policy_state(clipper)))
            assert attachment._adapter.loss_scale == (None if scale is None else scale / 2)
        elif rule == "zero":
            assert len(messages) == 1
            assert "were set to zero" in messages[0]
            assert all(bool(param.isfinite().all()) for param in after.values())
            # All elements are non-finite, so only momentum moves the parameters.
            assert engine.skipped_steps == num_skipped
            assert not same_params(after, before)
        else:
            assert engine.skipped_steps == num_skipped
            assert not messages
            assert any(bool(param.isnan().any()) for param in after.values())
            assert torch.as_tensor(engine.get_global_grad_norm()).isnan()
            return
        step(engine, setting, 2)
        next_params = full_fp32_params(engine)
        assert all(bool(param.isfinite().all()) for param in next_params.values())
        assert not same_params(next_params, after)
        assert engine.skipped_steps == num_skipped + skips

    def skipped_by_policy(self, setting: Setting) -> None:
        torch.manual_seed(0)
        engine = build_engine(Uneven(), setting, lambda groups: torch.optim.SGD(groups, lr=0.001))
        attachment = attach(engine, median_mad(k=3, window=8, warmup=3, skip=True))
        for _ in range(5):
            step(engine, setting, 0)
        before, scale = full_fp32_params(engine), attachment._adapter.loss_scale
        step(engine, setting, 0, 200.0)
        report = attachment.report
        assert report is not None
        assert same_params(full_fp32_params(engine), before), report.as_dict()
        assert attachment._adapter.loss_scale == scale
        assert engine.skipped_steps == 1
        assert bool(report.finite)
        assert bool(report.skipped)
        torch.testing.assert_close(torch.as_tensor(engine.get_global_grad_norm()), report.norm)

    def checkpoint(self, setting: Setting, folder: str) -> None:
        """Load a checkpoint of DeepSpeed. A policy that reads weights then reads those of the checkpoint."""
        torch.manual_seed(0)
        engine = build_engine(Uneven(), replace(setting, config=setting.config | {"gradient_clipping": 1e-3}), sgd)
        attachment = attach(engine, agc(0.02))
        step(engine, setting, 0)
        engine.save_checkpoint(folder, tag="one")
        state = attachment.state_dict()
        runs: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for _ in range(2):
            step(engine, setting, 1)
            assert attachment.report is not None
            runs.append((attachment.report.norms, attachment.report.coefs, full_fp32_params(engine)))
            step(engine, setting, 2)
            engine.load_checkpoint(folder, tag="one")
            attachment.load_state_dict(state)
        (norms, coefs, params), (resumed_norms, resumed_coefs, resumed_params) = runs
        torch.testing.assert_close(resumed_norms, norms, rtol=0, atol=0)
        torch.testing.assert_close(resumed_coefs, coefs, rtol=0, atol=0)
        assert same_params(params, resumed_params)
        assert float(coefs.min()) < 1
        assert int(attachment.state_dict()["counts"]["steps"]) == 1

    def invalid_input(self, setting: Setting) -> None:
        engine = build_engine(Uneven(), setting, sgd)
        first = dist.get_rank() == 0
        clipper = GradClipper(Uneven(), value(1.0))
        for call, text in (
            (lambda: attach(engine, 1.0), "policy=1.0: expected a policy"),  # type: ignore[arg-type]
            (lambda: attach(engine, 1.0 if first else global_norm(1.0)), "policy=1.0"),  # type: ignore[arg-type]
            (lambda: attach(engine if first else object(), global_norm(1.0)), "expected the engine that deepspeed"),
            (lambda: attach(engine, global_norm(1.0 if first else 2.0)), "different policies"),
            (lambda: attach(engine, clipper, on_nonfinite="skip"), "has its own on_nonfinite"),
            (lambda: detach(engine), "nothing is attached"),
            (lambda: config(value(1.0)), "DeepSpeed itself clips only the 2-norm"),
            (lambda: config(global_norm(1.0, 3.0)), "DeepSpeed itself clips only the 2-norm"),
        ):
            _, error = warnings_and_error_of(call)
            assert text in error
        attach(engine, global_norm(1.0))
        _, error = warnings_and_error_of(lambda: attach(engine, global_norm(1.0)))
        assert "has a policy already" in error
        step(engine, setting, 0)

    def detach(self, setting: Setting) -> None:
        """Compare with an engine that was never attached. Then attach a clipper, which keeps its state."""
        torch.manual_seed(0)
        clipping = replace(setting, config=setting.config | {"gradient_clipping": 1e-3})
        engine, twin = (build_engine(copy.deepcopy(module), clipping, sgd) for module in [Uneven()] * 2)
        optimizer = getattr(engine, "basic_optimizer", engine.optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        methods = {key for key, attribute in vars(engine.optimizer).items() if callable(attribute)}
        attachment = attach(engine, global_norm(1e-6))
        assert engine.distclip is attachment
        step(engine, clipping, 0)
        with warnings.catch_warnings():
            # A scheduler warns if the step that it has patched is replaced.
            warnings.simplefilter("error")
            scheduler.step()
        detach(engine)
        assert methods == {key for key, attribute in vars(engine.optimizer).items() if callable(attribute)}
        for seed in range(1, 4):
            updates = []
            for stepped in (engine, twin):
                start = full_fp32_params(stepped)
                step(stepped, clipping, seed)
                end = full_fp32_params(stepped)
                updates.append(torch.cat([(end[n] - start[n]).flatten() for n in start]).norm())
            assert 0.5 < float(updates[0] / updates[1]) < 2
        clipper = GradClipper(Uneven(), zclip(cap=1.0, warmup=1), max_skips=3)
        state = clipper.state_dict()
        state["counts"]["skipped"] = torch.tensor(7)
        clipper.load_state_dict(state)
        again = attach(engine, clipper)
        # A scheduler that is made now expects an optimizer whose step is a method.
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        step(engine, clipping, 4)
        assert again.clipper is clipper
        assert clipper.skipped == 7
        assert again.report is not None
        assert attachment.report is not again.report
