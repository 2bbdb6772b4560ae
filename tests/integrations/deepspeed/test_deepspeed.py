"""DeepSpeed: every stage, precision and kind of policy, against one process in float64 on the global batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import ReplicaError
from distclip.integrations.deepspeed import attach
from distclip.reference import total_norm
from tests.frameworks import skip_without
from tests.integrations.deepspeed.engines import (
    DTYPES,
    Setting,
    Uneven,
    backward,
    build_engine,
    full_fp32_params,
    reduced_grads,
    sgd,
)
from tests.integrations.deepspeed.integration import DeepSpeed
from tests.integrations.deepspeed.model_parallel import check_experts, check_tensor_parallel
from tests.ranks import on_ranks

skip_without("deepspeed")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
KINDS = {
    **{f"zero{stage}-{dtype}": Setting(stage, dtype) for stage in range(4) for dtype in DTYPES},
    "zero1-bf16-in-fp32": Setting(1, "bf16", config=IN_FP32),
    "zero0-bf16-fused": Setting(0, "bf16", fused=True),
    "zero0-fp16-fused": Setting(0, "fp16", fused=True),
}
"""Every optimizer of DeepSpeed with a separate adapter, in every precision."""
EACH_ADAPTER = ["zero0-fp32", "zero0-bf16", "zero0-fp16", "zero1-fp32", "zero2-fp16", "zero3-bf16"]
EACH_ADAPTER += ["zero0-bf16-fused", "zero0-fp16-fused"]

POLICIES: dict[str, Any] = {
    "model": distclip.global_norm(0.5),
    "tensor": distclip.per_tensor_norm(0.2),
    "row": distclip.agc(0.02),
}
CONFIGURATIONS = {
    "accumulation": (Setting(2, num_micro_batches=3), distclip.zclip(cap=1.0, warmup=2)),
    "accumulation 0": (Setting(0, num_micro_batches=3), distclip.per_tensor_norm(0.2)),
    "accumulation 0, fp16": (Setting(0, "fp16", num_micro_batches=3), distclip.global_norm(0.5)),
    "accumulation 3": (Setting(3, num_micro_batches=3), distclip.per_tensor_norm(0.2)),
    "accumulation in fp32": (Setting(1, "bf16", num_micro_batches=3, config=IN_FP32), distclip.agc(0.02)),
    "offload 1": (Setting(1, zero=OFFLOAD), distclip.per_tensor_norm(0.2)),
    "offload 2": (Setting(2, "bf16", num_micro_batches=3, zero=OFFLOAD), distclip.agc(0.02)),
    "offload 3": (
        Setting(3, num_micro_batches=3, zero=OFFLOAD | {"offload_param": {"device": "cpu"}}),
        distclip.agc(0.02),
    ),
    "alignment": (Setting(2, zero={"parameter_alignment": True}), distclip.per_tensor_norm(0.2)),
    "alignment, offload": (Setting(2, zero=OFFLOAD | {"parameter_alignment": True}), distclip.agc(0.02)),
    "round robin": (Setting(2, zero={"round_robin_gradients": True}), distclip.agc(0.02)),
    "small sub-groups": (Setting(3, zero={"sub_group_size": 100}), distclip.agc(0.02)),
    "overlap": (Setting(2, zero={"overlap_comm": True}), distclip.group_norm({"head": ("last", 0.05)}, 0.3)),
    **{
        f"autocast {stage}": (
            Setting(stage, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, rounds_as="bf16"),
            distclip.per_tensor_norm(0.2),
        )
        for stage in range(4)
    },
    "without a norm": (
        Setting(2, zero={"compute_grad_norm": False}, config={"gradient_clipping": 0.0}),
        distclip.global_norm(0.5),
    ),
    "value, scaled": (Setting(2, "fp16"), distclip.value(2.0)),
    "inf-norm": (Setting(3), distclip.global_norm(0.05, float("inf"))),
    "one group, adaptive": (Setting(1, num_groups=1), distclip.adagc(1.04, warmup=2)),
}
WITH_EXPERTS = ["zero0-fp32", "zero1-fp32", "zero2-fp32", "zero0-fp16", "zero2-bf16", "zero1-bf16-in-fp32"]
WITH_EXPERTS += ["zero0-bf16-fused"]


# The policy per tensor runs on four ranks.
@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("policy", ["model", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process(kind: str, policy: str) -> None:
    DeepSpeed().steps_as_one_process(KINDS[kind], POLICIES[policy])


@on_ranks(4, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process_on_four_ranks(kind: str) -> None:
    DeepSpeed().steps_as_one_process(KINDS[kind], POLICIES["tensor"], num_steps=3)


ON_FOUR = ["accumulation", "accumulation 3", "alignment", "offload 2", "offload 3", "round robin", "small sub-groups"]
"""Configurations with other partitions on four ranks."""


@pytest.mark.parametrize(("configuration", "num_ranks"), [(c, 4 if c in ON_FOUR else 2) for c in CONFIGURATIONS])
@on_ranks(fixture="ranks")
def test_configurations_step_as_one_process(configuration: str) -> None:
    DeepSpeed().steps_as_one_process(*CONFIGURATIONS[configuration])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_on_one_rank(kind: str) -> None:
    DeepSpeed().nonfinite_on_one_rank(KINDS[kind])


@on_ranks(4, fixture="ranks")
def test_nonfinite_is_found_even_if_deepspeed_does_not_check() -> None:
    unchecked = Setting(2, "bf16", config={"bf16": {"enabled": True, "check_grad_overflow": False}})
    DeepSpeed().nonfinite_on_one_rank(unchecked, "skip")


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", EACH_ADAPTER)
def test_step_skipped_by_policy(kind: str) -> None:
    DeepSpeed().skipped_by_policy(KINDS[kind])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fused" not in kind])
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    DeepSpeed().checkpoint(KINDS[kind], str(tmp_path))


@on_ranks(2, fixture="ranks")
def test_invalid_input() -> None:
    DeepSpeed().invalid_input(Setting(1))


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", EACH_ADAPTER)
def test_detach(kind: str) -> None:
    DeepSpeed().detach(KINDS[kind])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize(("stage", "scaled_by_deepspeed"), [(0, False), (1, False), (2, False), (3, False), (0, True)])
def test_growth_of_the_loss_scale_changes_no_update(stage: int, scaled_by_deepspeed: bool) -> None:
    """With float16, DeepSpeed itself halves updates. A later DeepSpeed may scale the loss at stage 0 too."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    setting = Setting(stage, "fp16", num_groups=1, config={"fp16": {"enabled": True, "loss_scale_window": 2}})
    engine = build_engine(model, setting, lambda groups: torch.optim.SGD(groups, lr=1.0))
    if scaled_by_deepspeed:
        engine_backward = engine.backward
        engine.backward = lambda loss, **options: engine_backward(loss * engine.optimizer.loss_scale, **options)
    attachment = attach(engine, distclip.global_norm(100.0))
    scales = set()
    for k in range(6):
        engine.backward(engine(torch.ones(1, 4).half()).float().sum())
        scales.add(attachment._adapter.loss_scale)
        engine.step()
        (weight,) = full_fp32_params(engine).values()
        torch.testing.assert_close(weight, torch.full((1, 4), -k - 1.0, dtype=torch.float64))
        assert float(engine.get_global_grad_norm()) == 2.0
    assert len(scales) > 2


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("zero0")])
def test_rank_without_gradients(kind: str) -> None:
    torch.manual_seed(0)
    setting, module = KINDS[kind], Uneven()
    engine = build_engine(module, setting, sgd)
    attachment = attach(engine, distclip.per_tensor_norm(0.1))
    module.reaches_first = dist.get_rank() != 0
    backward(engine, torch.ones(2, 13), torch.ones(2, 3), DTYPES[setting.dtype])
    scale = attachment._adapter.loss_scale or 1.0
    expected = total_norm(grad / scale for grad in reduced_grads(engine).values())
    engine.step()
    assert attachment.report is not None
    torch.testing.assert_close(attachment.report.norm.double(), expected, rtol=1e-6, atol=0)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("zero0")])
def test_replicas_that_differ_raise(kind: str) -> None:
    torch.manual_seed(0)
    module = Uneven()
    engine = build_engine(module, KINDS[kind], sgd)
    attach(engine, distclip.global_norm(0.5))
    backward(engine, torch.ones(2, 13), torch.ones(2, 3), DTYPES[KINDS[kind].dtype])
    if dist.get_rank() == 1:
        assert module.last.weight.grad is not None
        module.last.weight.grad[0, 0] *= 2
    with pytest.raises(ReplicaError, match=r"gradient of last\.weight differs between ranks 0, 1"):
        engine.step()


# DeepSpeed keeps the groups of Megatron until the process ends.
@on_ranks(4, fixture="isolated_ranks")
@pytest.mark.parametrize("policy", ["tensor", "row"])
@pytest.mark.parametrize("stage", range(3))
def test_tensor_parallel(stage: int, policy: str) -> None:
    check_tensor_parallel(stage, POLICIES[policy])


@pytest.mark.parametrize(("policy", "num_ranks"), [("model", 2), ("tensor", 4)])
@pytest.mark.parametrize("kind", WITH_EXPERTS)
@on_ranks(fixture="ranks")
def test_experts(kind: str, policy: str) -> None:
    check_experts(replace(KINDS[kind], num_groups=1), POLICIES[policy])
