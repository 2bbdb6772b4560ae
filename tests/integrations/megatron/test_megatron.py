"""Optimizers of Megatron-core on gloo ranks, with distclip attached and with its two drop-in functions."""

from __future__ import annotations

import math
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import distclip
from distclip import PeerError, reference
from distclip.integrations import megatron as integration
from distclip.integrations.megatron import attach
from distclip.integrations.megatron.parameters import share_names
from tests.frameworks import skip_without
from tests.integrations.megatron.gpt import check_gpt
from tests.integrations.megatron.integration import (
    Megatron,
    copy_state,
    is_last_rank,
    last_piece,
    leaves_of,
    loss_scales_of,
    poison,
    same_state,
    step,
    stepped_params,
)
from tests.integrations.megatron.model import (
    LR,
    SCALE,
    Coordinates,
    Setting,
    build_model,
    build_optimizer,
    fill,
    full_tensors,
    local_part_of,
    megatron,
)
from tests.ranks import gather_from_ranks, on_ranks, replicas_may_differ

skip_without("megatron.core")

POLICIES = [
    distclip.per_tensor_norm(0.2),
    distclip.agc(0.02, exclude=["norm"]),
    # The last stage's name of the tied parameter does not match.
    distclip.group_norm({"in": (r"^(tied|up)\.", 0.05), "norms": ("norm", 0.1)}, 0.3),
]
"""One of each granularity with several slots, for all settings. Each of them has the total norm too."""
MORE_POLICIES = [
    distclip.global_norm(1.0),
    distclip.value(0.5),
    distclip.global_norm(0.5, math.inf),
    distclip.zclip(cap=30.0, warmup=2),
    distclip.adagc(1.04, warmup=1),
]
SETTINGS = {
    "data parallel": (4, Setting()),
    "tp x pp": (4, Setting(tp=2, pp=2)),
    "experts": (4, Setting(tp=2, ep=2)),
    "experts with tp": (4, Setting(tp=2, ep=2, etp=2)),
    "bf16": (4, Setting(tp=2, pp=2, dtype="bf16")),
    "fp16 experts": (4, Setting(ep=2, dtype="fp16")),
    "distributed": (4, Setting(tp=2, distributed=True)),
    "distributed bf16": (4, Setting(pp=2, dtype="bf16", distributed=True)),
    "distributed fp16": (4, Setting(pp=2, ep=2, dtype="fp16", distributed=True)),
    "layer-wise": (4, Setting(tp=2, layer_wise=True)),
    "layer-wise experts bf16": (4, Setting(ep=2, dtype="bf16", layer_wise=True)),
    "two stages": (2, Setting(pp=2, dtype="fp16")),
    "two slices": (2, Setting(dtype="bf16", distributed=True)),
    "precision-aware": (2, Setting(dtype="bf16", distributed=True, precision_aware=True)),
}
FP16 = [name for name, (_, setting) in SETTINGS.items() if setting.dtype == "fp16"]
SOME = ["tp x pp", "fp16 experts", "distributed bf16"]


def on_ranks_of(*names: str) -> Any:
    """Run a test on the ranks of each setting."""

    def decorate(body: Any) -> Any:
        cases = pytest.mark.parametrize(("num_ranks", "name"), [(SETTINGS[name][0], name) for name in names])
        return cases(on_ranks(fixture="ranks")(body))

    return decorate


@on_ranks_of(*SETTINGS)
def test_steps_as_one_process(name: str) -> None:
    Megatron().steps_under_policies(SETTINGS[name][1], POLICIES)


@on_ranks_of(*SOME)
def test_steps_under_more_policies_as_one_process(name: str) -> None:
    Megatron().steps_under_policies(SETTINGS[name][1], MORE_POLICIES)


@on_ranks_of(*SOME, "data parallel", "distributed fp16", "two stages", "precision-aware")
def test_nonfinite_on_one_rank(name: str) -> None:
    Megatron().nonfinite_on_one_rank(SETTINGS[name][1])


@on_ranks_of(*SOME)
def test_step_skipped_by_policy(name: str) -> None:
    Megatron().skipped_by_policy(SETTINGS[name][1])


@on_ranks_of("bf16", "distributed bf16")
def test_checkpoint(name: str, tmp_path: Path) -> None:
    Megatron().checkpoint(SETTINGS[name][1], str(tmp_path))


@on_ranks(2, fixture="ranks")
def test_invalid_input() -> None:
    Megatron().invalid_input(Setting())


@on_ranks_of(*SOME, "precision-aware")
def test_detach(name: str) -> None:
    Megatron().detach(SETTINGS[name][1])


@on_ranks_of(*SOME)
def test_too_many_skipped_steps_raise_on_every_rank(name: str) -> None:
    setting = SETTINGS[name][1]
    with megatron(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        with replicas_may_differ():
            attachment = attach(optimizer, distclip.global_norm(1.0), model=[model], max_skips=2)
        # A finite step resets the count.
        for bad in (True, False, True):
            fill(model, setting, scale=loss_scales_of(optimizer)[0])
            if bad:
                poison(model, optimizer, float("nan"))
            assert step(optimizer)[0][0] is not bad
        fill(model, setting, scale=loss_scales_of(optimizer)[0])
        poison(model, optimizer, float("nan"))
        before = copy_state(model, optimizer, attachment)
        error = step(optimizer)[2]
        assert error.startswith("TooManySkippedSteps: step 4: 2 ")
        assert same_state(before, copy_state(model, optimizer, attachment))


@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize(
    ("name", "param_name"), [("data parallel", "down.weight"), ("tp x pp", "norm.weight"), ("tp x pp", "tied")]
)
def test_replicas_that_differ_raise(name: str, param_name: str) -> None:
    """Change a gradient on the last rank: one of data-parallel replicas, of tensor-parallel ones, a tied embedding."""
    setting = SETTINGS[name][1]
    with megatron(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        attach(optimizer, distclip.global_norm(1.0), model=[model])
        fill(model, setting)
        assert step(optimizer)[2] == ""
        is_bad = is_last_rank()
        fill(model, setting, lambda name, grad: grad * 1.5 if is_bad and name.startswith(param_name) else grad)
        error = step(optimizer)[2]
        assert error.startswith(f"ReplicaError: step 2: replicas differ: the gradient of {param_name}")
        assert "rank 3" in error or "3 (norm" in error


@on_ranks_of(*FP16)
def test_growth_of_the_loss_scale_changes_no_update(name: str) -> None:
    """All loss scales of a chain grow together, and nothing keeps gradients alive."""
    setting = SETTINGS[name][1]
    with megatron(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting, loss_scale_window=2)
        attach(optimizer, distclip.global_norm(1.0), model=[model])
        exact = float(reference.total_norm(full_tensors(model, setting).values()))
        scales: list[float] = []
        for _ in range(6):
            scales += loss_scales_of(optimizer)
            start = [stepped.clone() for *_, stepped, _ in stepped_params(model, optimizer)]
            fill(model, setting, scale=scales[-1])
            success, norm, _ = optimizer.step()
            assert success
            assert abs(norm / exact - 1) < 1e-6
            for (param_name, param, stepped, elements), old in zip(
                stepped_params(model, optimizer), start, strict=True
            ):
                grad = local_part_of(param_name, param, setting, "gradients").reshape(-1)[elements]
                torch.testing.assert_close(old - stepped, LR / exact * grad, rtol=1e-4, atol=1e-5)
            # Slices of gradients are tensors of the optimizer. Full gradients are views of Megatron's buffer.
            pieces = list(stepped_params(model, optimizer)) if setting.distributed else []
            slices = [weakref.ref(param.main_param.grad) for _, param, *_ in pieces]  # type: ignore[attr-defined]
            optimizer.zero_grad()
            assert not any(grad() is not None for grad in slices)
        assert sorted(set(scales)) == [SCALE, 2 * SCALE, 4 * SCALE]


@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("distributed", [False, True])
def test_loss_scales_of_a_chain_back_off_together(distributed: bool, attached: bool) -> None:
    """An expert overflows on the last rank. Megatron itself lowers only the loss scale of its experts."""
    setting = Setting(ep=2, dtype="fp16", distributed=distributed)
    with megatron(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        if attached:
            with replicas_may_differ():
                attach(optimizer, distclip.global_norm(1.0), model=[model])
        is_bad = is_last_rank()
        fill(model, setting, lambda name, grad: grad * float("inf") if is_bad and "expert" in name else grad)
        outcome = optimizer.step()[0], [float(leaf.get_loss_scale()) for leaf in leaves_of(optimizer)]
    by_rank = gather_from_ranks(outcome)
    if attached:
        assert by_rank == [(False, [SCALE / 2, SCALE / 2])] * 4
        return
    assert by_rank[3] == (False, [SCALE, SCALE / 2])
    # Without a distributed optimizer, some ranks make the step and others do not.
    assert by_rank[0] == ((False, [SCALE, SCALE / 2]) if distributed else (True, [SCALE, SCALE]))


@on_ranks_of(*SOME)
def test_exception_on_one_rank_is_raised_on_every_rank(name: str) -> None:
    setting = SETTINGS[name][1]
    with megatron(setting):
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        attachment = attach(optimizer, distclip.per_tensor_norm(0.1), model=[model])
        fill(model, setting)
        before = copy_state(model, optimizer, attachment)
        leaf = leaves_of(optimizer)[-1]
        method = "_copy_model_grads_to_main_grads" if hasattr(leaf, "grad_scaler") else "prepare_grads"
        raised: Any = None
        with ExitStack() as stack:
            if is_last_rank():
                stack.enter_context(mock.patch.object(leaf, method, side_effect=RuntimeError("no memory")))
            try:
                optimizer.step()
            except RuntimeError as error:
                raised = error
        from_peer = f"rank {dist.get_world_size() - 1} failed with RuntimeError: "
        assert str(raised) == ("" if is_last_rank() else from_peer) + "no memory"
        assert is_last_rank() or isinstance(raised, PeerError)
        assert same_state(before, copy_state(model, optimizer, attachment))
        # The next step is made.
        fill(model, setting)
        assert step(optimizer)[0][0]
        assert not same_state(before, copy_state(model, optimizer, attachment))


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stage_without_parameters_takes_part_in_every_decision(dtype: str, distributed: bool) -> None:
    setting = Setting(pp=2, dtype=dtype, distributed=distributed)
    with megatron(setting):
        stage = Coordinates().pp
        model = build_model(setting, trained=stage == 0)
        for param in model.module.parameters():
            # Megatron adds up the gradients of two copies only if both are trained.
            param.shared_embedding = False
        optimizer = build_optimizer(model, setting)
        assert (not optimizer.chained_optimizers[0].get_parameters()) is (stage > 0)
        attach(optimizer, distclip.per_tensor_norm(0.1), model=[model])
        fill(model, setting)
        grads = [local_part_of(name, param, setting, "gradients") for name, param in model.module.named_parameters()]
        exact = float(reference.total_norm(gather_from_ranks(grads)[0]))
        success, norm, _ = step(optimizer)[0]
        assert success
        assert abs(norm / exact - 1) < 1e-6
        fill(model, setting)
        if stage == 0:
            grad, _, start = last_piece(model, optimizer)
            grad[start] = float("inf")
        result, messages, _ = step(optimizer)
        assert result == (False, None, None)
        assert len(messages) == (setting.dtype != "fp16")
        loss_scales_of(optimizer)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("policy", ["model", "tensor", "row", "group"])
def test_gpt_with_a_tied_embedding(policy: str, distributed: bool) -> None:
    policies: dict[str, Any] = {
        "model": distclip.global_norm(0.5),
        "tensor": distclip.per_tensor_norm(0.05),
        "row": distclip.agc(0.02),
        "group": distclip.group_norm({"embedding": ("^embedding", 0.1)}, 0.3),
    }
    check_gpt(policies[policy], distributed)


def test_ambiguous_tied_embeddings_are_refused() -> None:
    by_rank = [[("a", True), ("b", True)], [("c", False)]]
    with pytest.raises(distclip.ArgumentError, match="a, b are embeddings that other stages have copies of"):
        share_names([], by_rank)


ONE_STEP = {
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


def step_once(setting: Setting, clipped_by: str) -> float:
    """Step once, check the weights, and return the reported norm relative to the exact one."""
    with megatron(setting), ExitStack() as stack:
        from megatron.core.optimizer import optimizer as megatron_optimizer

        if clipped_by == "drop-in":
            for function in ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"):
                stack.enter_context(mock.patch.object(megatron_optimizer, function, getattr(integration, function)))
        model = build_model(setting)
        optimizer = build_optimizer(model, setting)
        if clipped_by == "attach":
            attach(optimizer, distclip.global_norm(1.0), model=[model])
        fill(model, setting)
        success, norm, _ = optimizer.step()
        assert success
        exact = float(reference.total_norm(full_tensors(model, setting).values()))
        for name, param in model.module.named_parameters():
            before = local_part_of(name, param, setting, "weights") * 0.1
            after = before - LR / (exact + 1e-6) * local_part_of(name, param, setting, "gradients")
            tolerance = TOLERANCE[setting.dtype]
            torch.testing.assert_close(param.float(), after, rtol=tolerance, atol=tolerance, msg=name)
    return float(norm) / exact


@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("clipped_by", ["Megatron", "drop-in", "attach"])
def test_step_is_clipped_by_the_norm_of_the_whole_gradient(name: str, clipped_by: str) -> None:
    if name == "experts x tp" and clipped_by != "attach":
        # Before either function is called, Megatron drops an expert's plain parameter on all tensor-parallel ranks but
        # the first, as a replica. With a separate tensor-parallel group of experts it is a parameter of another expert.
        wrong = ""
        try:
            step_once(ONE_STEP[name], clipped_by)
        except AssertionError as error:
            wrong = str(error)
        assert all(gather_from_ranks(wrong))
        return
    ratios = gather_from_ranks(step_once(ONE_STEP[name], clipped_by))
    assert len(set(ratios)) == 1 or clipped_by == "Megatron"
    assert ratios == pytest.approx([1.0] * 4, rel=1e-5 if clipped_by == "Megatron" else 1e-6)


@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_drop_in_norm_with_a_rank_without_gradients(norm_type: float) -> None:
    with megatron(Setting(tp=4)):
        from megatron.core.optimizer import clip_grads

        rank = dist.get_rank()
        local = [] if rank == 0 else [torch.full((3,), float(rank))]
        full = [torch.full((3,), float(r)) for r in range(1, 4)]
        expected = float(reference.total_norm(full, norm_type))
        norm = integration.get_grad_norm_fp32(local, norm_type)
        assert norm == pytest.approx(expected, rel=1e-6)
        if norm_type == 2:
            assert clip_grads.get_grad_norm_fp32(local, 2) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("attribute", ["grad", "decoupled_grad"])
def test_drop_in_scales_the_chosen_gradient(attribute: str) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    setattr(param, attribute, torch.tensor([3.0, 4.0]))
    for total_norm, expected in ((0.5, [3.0, 4.0]), (float("nan"), [3.0, 4.0]), (5.0, [0.6, 0.8])):
        integration.clip_grad_by_total_norm_fp32([param], 1.0, total_norm, attribute == "decoupled_grad")
        torch.testing.assert_close(getattr(param, attribute), torch.tensor(expected))
