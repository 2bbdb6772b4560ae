"""DeepSpeed for real: every stage, precision and policy, beside one process in float64 on the same global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import distclip
from tests.integrations.deepspeed import model_parallel, rules, training
from tests.integrations.deepspeed.engines import DTYPES, Setting
from tests.ranks import World

pytest.importorskip("deepspeed")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
KINDS = {
    **{f"zero{stage}-{dtype}": Setting(stage, dtype) for stage in range(4) for dtype in DTYPES},
    "zero1-bf16-in-fp32": Setting(1, "bf16", top=IN_FP32),
    "zero0-bf16-fused": Setting(0, "bf16", fused=True),
    "zero0-fp16-fused": Setting(0, "fp16", fused=True),
}
"""Every optimizer of DeepSpeed that is held in a way of its own, in every precision."""

WITH_EXPERTS = ["zero0-fp32", "zero1-fp32", "zero2-fp32", "zero0-fp16", "zero2-bf16", "zero1-bf16-in-fp32"]
WITH_EXPERTS += ["zero0-bf16-fused"]

POLICIES = {
    "model": distclip.global_norm(0.5),
    "tensor": distclip.per_tensor_norm(0.2),
    "row": distclip.agc(0.02),
}
OTHERS = {
    "accumulation": (Setting(2, ga=3), distclip.zclip(cap=1.0, warmup=2)),
    "accumulation 0": (Setting(0, ga=3), distclip.per_tensor_norm(0.2)),
    "accumulation 0, fp16": (Setting(0, "fp16", ga=3), distclip.global_norm(0.5)),
    "accumulation 3": (Setting(3, ga=3), distclip.per_tensor_norm(0.2)),
    "accumulation in fp32": (Setting(1, "bf16", ga=3, top=IN_FP32), distclip.agc(0.02)),
    "offload 1": (Setting(1, more=OFFLOAD), distclip.per_tensor_norm(0.2)),
    "offload 2": (Setting(2, "bf16", ga=3, more=OFFLOAD), distclip.agc(0.02)),
    "offload 3": (Setting(3, ga=3, more=OFFLOAD | {"offload_param": {"device": "cpu"}}), distclip.agc(0.02)),
    "alignment": (Setting(2, more={"parameter_alignment": True}), distclip.per_tensor_norm(0.2)),
    "alignment, offload": (Setting(2, more=OFFLOAD | {"parameter_alignment": True}), distclip.agc(0.02)),
    "round robin": (Setting(2, more={"round_robin_gradients": True}), distclip.agc(0.02)),
    "small sub-groups": (Setting(3, more={"sub_group_size": 100}), distclip.agc(0.02)),
    "overlap": (Setting(2, more={"overlap_comm": True}), distclip.group_norm({"head": ("last", 0.05)}, 0.3)),
    **{
        f"autocast {stage}": (
            Setting(stage, top={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, tolerated="bf16"),
            distclip.per_tensor_norm(0.2),
        )
        for stage in range(4)
    },
    "no norm asked": (
        Setting(2, more={"compute_grad_norm": False}, top={"gradient_clipping": 0.0}),
        distclip.global_norm(0.5),
    ),
    "value, scaled": (Setting(2, "fp16"), distclip.value(2.0)),
    "inf-norm": (Setting(3), distclip.global_norm(0.05, float("inf"))),
    "one group, adaptive": (Setting(1, groups=1), distclip.adagc(1.04, warmup=2)),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[..., World]]:
    """Worlds of this file alone, and of one kind: DeepSpeed leaves much behind in a process."""
    worlds: dict[Any, World] = {}
    yield lambda size, kind=None: worlds.setdefault((size, kind), World(size))
    for world in worlds.values():
        world.stop()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process(ranks: Callable[..., World], kind: str, policy: str) -> None:
    ranks(2).run(training.train, setting=KINDS[kind], policy=POLICIES[policy])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", OTHERS)
def test_configurations(ranks: Callable[..., World], case: str, size: int) -> None:
    setting, policy = OTHERS[case]
    ranks(size).run(training.train, setting=setting, policy=policy)


@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks(ranks: Callable[..., World], kind: str) -> None:
    ranks(4).run(training.train, setting=KINDS[kind], policy=distclip.per_tensor_norm(0.2), steps=3)


@pytest.mark.parametrize("rule", ["skip", "raise", "zero", "propagate"])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_on_one_rank(ranks: Callable[..., World], kind: str, rule: str) -> None:
    ranks(2).run(rules.nonfinite, setting=KINDS[kind], rule=rule)


def test_not_finite_though_deepspeed_would_not_look(ranks: Callable[..., World]) -> None:
    unlooked = Setting(2, "bf16", top={"bf16": {"enabled": True, "check_grad_overflow": False}})
    ranks(4).run(rules.nonfinite, setting=unlooked, rule="skip")


@pytest.mark.parametrize("kind", KINDS)
def test_policy_leaves_a_step_out(ranks: Callable[..., World], kind: str) -> None:
    ranks(2).run(rules.leaves_out, setting=KINDS[kind])


@pytest.mark.parametrize("stage", range(4))
def test_growing_loss_scale_halves_no_update(ranks: Callable[..., World], stage: int) -> None:
    ranks(2).run(training.growth, setting=Setting(stage, "fp16", groups=1))


def test_stage_0_is_scaled_once_if_deepspeed_comes_to_do_it(ranks: Callable[..., World]) -> None:
    ranks(2).run(training.growth, setting=Setting(0, "fp16", groups=1), scaled_already=True)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_is_given_back(ranks: Callable[..., World], kind: str) -> None:
    ranks(2).run(rules.gives_back, setting=KINDS[kind])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("zero0")])
def test_rank_without_gradients(ranks: Callable[..., World], kind: str) -> None:
    ranks(2).run(training.missing, setting=KINDS[kind])


@pytest.mark.parametrize("policy", ["tensor", "row"])
@pytest.mark.parametrize("stage", range(3))
def test_tensor_parallel(ranks: Callable[..., World], stage: int, policy: str) -> None:
    bound: Any = POLICIES[policy]
    ranks(4, "Megatron").run(model_parallel.tensor_parallel, stage=stage, policy=bound)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fused" not in kind])
def test_checkpoints(ranks: Callable[..., World], kind: str, tmp_path: Path) -> None:
    ranks(2).run(rules.reloads, setting=KINDS[kind], policy=POLICIES["row"], folder=str(tmp_path))


def test_bad_input(ranks: Callable[..., World]) -> None:
    ranks(2).run(rules.refuses)


@pytest.mark.parametrize("policy", ["model", "tensor"])
@pytest.mark.parametrize(
    "kind",
    ["zero0-fp32", "zero1-fp32", "zero2-fp32", "zero0-fp16", "zero2-bf16", "zero1-bf16-in-fp32", "zero0-bf16-fused"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_experts(ranks: Callable[..., World], size: int, kind: str, policy: str) -> None:
    bound: Any = POLICIES[policy]
    ranks(size).run(model_parallel.experts, setting=replace(KINDS[kind], groups=1), policy=bound)
