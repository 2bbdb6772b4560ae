"""Optimizers of Megatron-FSDP on gloo ranks: real buffers, DTensors and optimizers, on CPUs in place of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip import reference
from distclip.integrations.megatron import attach, detach
from tests.frameworks import skip_without
from tests.integrations.megatron.integration import OneProcess, check_equal_on_ranks, error_on_ranks, is_last_rank, step
from tests.integrations.megatron.model import (
    DTYPES,
    SCALE,
    Coordinates,
    Setting,
    build_model,
    build_optimizer,
    full_tensor,
    key_of,
    local_part_of,
    megatron,
    shape_of,
)
from tests.ranks import gather_from_ranks, on_ranks, replicas_may_differ

skip_without("megatron.core")
skip_without("einops")

POLICIES = [
    distclip.global_norm(1.0),
    distclip.per_tensor_norm(0.2),
    distclip.agc(0.02, exclude=["norm"]),
]
SETTINGS = {
    "all sharded": (2, Setting(fsdp="optim_grads_params", distributed=True)),
    "gradients sharded": (2, Setting(fsdp="optim_grads", dtype="bf16", distributed=True)),
    "optimizer sharded": (2, Setting(fsdp="optim", dtype="fp16", distributed=True)),
    "replicated": (2, Setting(fsdp="no_shard", distributed=True)),
    "with tp": (4, Setting(tp=2, fsdp="optim_grads_params", dtype="bf16", distributed=True)),
    "in two instances": (4, Setting(fsdp="optim_grads_params", instances=2, distributed=True)),
    "decoupled gradients": (
        2,
        Setting(fsdp="optim_grads_params", dtype="bf16", distributed=True, precision_aware=True),
    ),
    "experts": (4, Setting(ep=2, fsdp="optim_grads_params", distributed=True)),
}


def on_ranks_of(*names: str) -> Any:
    """Run a test on the ranks of each setting."""

    def decorate(body: Any) -> Any:
        cases = pytest.mark.parametrize(("num_ranks", "name"), [(SETTINGS[name][0], name) for name in names])
        return cases(on_ranks(fixture="ranks")(body))

    return decorate


def stepped_params(model: Any) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Yield (name, parameter of the model, flat local part of what is stepped, index of its first element)."""
    buffer = model.param_and_grad_buffer
    for name, param in buffer.optimizer_named_parameters:
        start = param.megatron_fsdp_slice.start if hasattr(param, "megatron_fsdp_slice") else 0
        yield name, param.orig_param, param.detach().to_local().view(-1), start


def fill(model: Any, setting: Setting, kind: str = "gradients", factor: float = 1.0) -> None:
    """Write gradients into Megatron's buffers, and attach them to what is stepped, as after a backward."""
    buffer = model.param_and_grad_buffer
    if setting.dtype == "fp16":
        factor *= SCALE
    for group in buffer.parameter_groups:
        for i, param in enumerate(group.params):
            name = buffer.param_to_name[param]
            group.main_grad_buffer.set_item(i, local_part_of(name, param, setting, kind) * factor)
    model.module.attach_grad_to_optimizer_state()


def full_tensors_of(model: Any, setting: Setting, kind: str) -> dict[str, Tensor]:
    """Return every parameter or gradient of the full model once, by `key_of`. Call it on every rank."""
    local = [(name, shape_of(name, param, setting), Coordinates().ep) for name, param, *_ in stepped_params(model)]
    entries = [entry for of_rank in gather_from_ranks(local) for entry in of_rank]
    return {key_of(name, 0, ep): full_tensor(name, shape, kind, 0, ep) for name, shape, ep in entries}


@contextmanager
def megatron_fsdp(setting: Setting) -> Iterator[None]:
    """Create Megatron's groups. After a step nothing is gathered, because no forward follows."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP

    with megatron(setting), mock.patch.object(MegatronFSDP, "start_param_sync"):
        yield


@on_ranks_of(*SETTINGS)
def test_steps_as_one_process(name: str) -> None:
    setting = SETTINGS[name][1]
    with megatron_fsdp(setting):
        for policy in POLICIES:
            model = build_model(setting)
            weights = full_tensors_of(model, setting, "weights")
            one_process = OneProcess({n: (w * 0.1).to(DTYPES[setting.dtype]) for n, w in weights.items()}, policy)
            optimizer = build_optimizer(model, setting)
            attachment = attach(optimizer, policy, model=[model])
            assert len(attachment.clipper.slots) == len(one_process.clipper.slots)
            for i, factor in enumerate((1.0, 1.0, 8.0)):
                kind = f"gradients {i}"
                fill(model, setting, kind, factor)
                grads = {n: g.double() * factor for n, g in full_tensors_of(model, setting, kind).items()}
                expected = one_process.step(grads)
                success, norm, _ = optimizer.step()
                assert success
                report = attachment.report
                assert report is not None
                exact = float(reference.total_norm(grads.values()))
                seen = [norm, float(report.norm), float(report.coef)]
                torch.testing.assert_close(seen, [exact, exact, float(expected.coef)], rtol=1e-5, atol=0)
                check_equal_on_ranks((report.norm.numpy().tobytes(), report.coefs.numpy().tobytes()))
            for n, param, local, start in stepped_params(model):
                full = one_process.params[key_of(n, 0, Coordinates().ep)].detach()
                if full.shape != param.shape:
                    full = full.chunk(setting.tp, param.partition_dim)[Coordinates().tp]
                piece = full.float().reshape(-1)[start : start + local.numel()]
                torch.testing.assert_close(local.float(), piece, rtol=1e-5, atol=2e-5, msg=lambda text, n=n: n + text)


@on_ranks_of("all sharded", "optimizer sharded", "in two instances")
def test_nonfinite_on_one_rank_is_skipped_on_all(name: str) -> None:
    setting = SETTINGS[name][1]
    with megatron_fsdp(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        with replicas_may_differ():
            attachment = attach(optimizer, distclip.zclip(cap=1.0), model=[model])
        fill(model, setting)
        assert step(optimizer)[0][0]
        before = [local.clone() for *_, local, _ in stepped_params(model)]
        fill(model, setting)
        if is_last_rank():
            grads_of(model)[-1].to_local().view(-1)[0] = float("nan")
        assert step(optimizer)[0] == (False, None, None)
        assert all(map(torch.equal, before, [local for *_, local, _ in stepped_params(model)]))
        assert attachment.clipper.skipped == 1
        if setting.dtype == "fp16":
            assert float(optimizer.get_loss_scale()) == SCALE / 2


@on_ranks_of("replicated", "in two instances")
def test_replicas_that_differ_raise(name: str) -> None:
    setting = SETTINGS[name][1]
    with megatron_fsdp(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        attach(optimizer, distclip.global_norm(1.0), model=[model])
        fill(model, setting, factor=1.5 if is_last_rank() else 1.0)
        assert step(optimizer)[2].startswith("ReplicaError: step 1: replicas differ: the gradient of ")


@on_ranks(2, fixture="ranks")
def test_detach_and_errors() -> None:
    setting = SETTINGS["all sharded"][1]
    with megatron_fsdp(setting):
        model, other = build_model(setting), build_model(setting)
        optimizer = build_optimizer(model, setting)
        attributes = dict(vars(optimizer))
        policy = distclip.per_tensor_norm(0.1)
        assert "uses parameter names" in error_on_ranks(lambda: attach(optimizer, policy))
        assert "that model= does not have" in error_on_ranks(lambda: attach(optimizer, policy, model=other))
        # While a forward runs, the modules have other parameters than between steps.
        model.module._replace_param_with_raw_if_needed()
        attach(optimizer, policy, model=[model])
        detach(optimizer)
        assert vars(optimizer) == attributes


@on_ranks(2, fixture="ranks")
def test_norms_of_real_backwards() -> None:
    """The norm of the reduced gradients, before and after `attach`."""
    setting = SETTINGS["all sharded"][1]
    with megatron(setting), streams_on_cpu():
        model = build_model(setting)
        optimizer = build_optimizer(model, setting, lr=1e-3, adam_eps=1e-8)
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
        norms, attachment = [], None
        for i in range(3):
            if i == 1:
                attachment = attach(optimizer, distclip.global_norm(1e-3), model=[model])
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            model.finish_grad_sync()
            squares = sum(float(grad.to_local().double().square().sum()) for grad in grads_of(model))
            expected = sum(gather_from_ranks(squares)) ** 0.5
            success, norm, _ = optimizer.step()
            assert success
            norms.append(norm / expected)
        torch.testing.assert_close(norms, [1.0, 1.0, 1.0], rtol=1e-5, atol=0)
        assert attachment is not None
        assert attachment.report is not None
        assert bool(attachment.report.clipped)
        # The optimizer has read the clipped gradients.
        squares = sum(float(grad.to_local().double().square().sum()) for grad in grads_of(model))
        assert sum(gather_from_ranks(squares)) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def grads_of(model: Any) -> list[Any]:
    """Return the DTensors that the optimizer reads as gradients: those with elements on this rank."""
    params = [param for _, param in model.param_and_grad_buffer.optimizer_named_parameters]
    return [param.grad for param in params if param.grad is not None]


@contextmanager
def streams_on_cpu() -> Iterator[None]:
    """Replace the streams of a GPU, so that collectives and copies run in the order of the program."""
    with (
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(torch.cuda, "stream", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "Event"),
    ):
        yield
