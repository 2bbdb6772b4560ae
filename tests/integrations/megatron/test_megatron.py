"""Megatron-core's own optimizers on gloo ranks, with distclip's norm: against fp64, and beside its functions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

from distclip import global_norm, reference
from distclip.integrations import megatron as ours
from tests.integrations.megatron.model import LR, Setting, fill, made, megatron, optimizer_of, piece, wholes
from tests.ranks import World

pytest.importorskip("megatron.core")

SETTINGS = {
    "data parallel": Setting(),
    "tp x pp": Setting(tp=2, pp=2),
    "tp x dp": Setting(tp=2),
    "experts": Setting(ep=2),
    "experts x tp": Setting(tp=2, ep=2),
    "bf16": Setting(tp=2, pp=2, dtype="bf16"),
    "fp16": Setting(tp=2, pp=2, dtype="fp16"),
    "distributed": Setting(tp=2, distributed=True),
    "distributed bf16 pp": Setting(pp=2, dtype="bf16", distributed=True),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def step(name: str, how: str) -> float:
    """One step, whose weights are looked at; the norm that it reports, relative to the true one."""
    setting = SETTINGS[name]
    with megatron(setting), ExitStack() as stack:
        from megatron.core.optimizer import optimizer as theirs

        if how == "drop-in":
            for function in ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"):
                stack.enter_context(mock.patch.object(theirs, function, getattr(ours, function)))
        model = made(setting)
        optimizer = optimizer_of(model, setting)
        if how == "attach":
            ours.attach(optimizer, global_norm(1.0), model=[model])
        fill(model, setting)
        success, norm, _ = optimizer.step()
        assert success
        true = float(reference.total_norm(wholes(model, setting).values()))
        for parameter, param in model.module.named_parameters():
            before = piece(parameter, param, setting, "weights") * 0.1
            after = before - LR / (true + 1e-6) * piece(parameter, param, setting, "gradients")
            tolerance = TOLERANCE[setting.dtype]
            torch.testing.assert_close(param.float(), after, rtol=tolerance, atol=tolerance, msg=parameter)
    return float(norm) / true


def off(name: str, how: str) -> str:
    """The parameter that a step leaves wrong on this rank."""
    try:
        step(name, how)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("how", ["theirs", "drop-in", "attach"])
def test_a_step_is_clipped_by_the_norm_of_the_whole_gradient(
    ranks: Callable[[int], World], name: str, how: str
) -> None:
    if name == "experts x tp" and how != "attach":
        # Megatron drops an expert's plain parameter on all tensor-parallel ranks but the first as a copy, before either
        # function sees it; where experts have a tensor-parallel group of their own it is another expert's.
        assert "expert_scale" in ranks(4).run(off, name=name, how=how)
        return
    found = ranks(4).run(step, name=name, how=how)
    assert len(set(found)) == 1 or how == "theirs"
    assert found == pytest.approx([1.0] * 4, rel=1e-6 if how != "theirs" else 1e-5)


def check_empty(norm_type: float) -> list[Any]:
    """Rank 0 has no gradient."""
    setting = Setting(tp=4)
    with megatron(setting):
        from megatron.core.optimizer import clip_grads

        mine = [] if torch.distributed.get_rank() == 0 else [torch.full((3,), float(torch.distributed.get_rank()))]
        whole = [torch.full((3,), float(r)) for r in range(1, 4)]
        assert ours.get_grad_norm_fp32(mine, norm_type) == pytest.approx(
            float(reference.total_norm(whole, norm_type)), rel=1e-6
        )
        if norm_type == 2:
            assert clip_grads.get_grad_norm_fp32(mine, 2) == pytest.approx(ours.get_grad_norm_fp32(mine, 2), rel=1e-6)
    return []


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_a_rank_without_gradients(ranks: Callable[[int], World], norm_type: float) -> None:
    ranks(4).run(check_empty, norm_type=norm_type)


@pytest.mark.parametrize("attribute", ["grad", "decoupled_grad"])
def test_scales_what_it_is_asked_to(attribute: str) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    setattr(param, attribute, torch.tensor([3.0, 4.0]))
    for total, left in ((0.5, [3.0, 4.0]), (float("nan"), [3.0, 4.0]), (5.0, [0.6, 0.8])):
        ours.clip_grad_by_total_norm_fp32([param], 1.0, total, attribute == "decoupled_grad")
        torch.testing.assert_close(getattr(param, attribute), torch.tensor(left))
