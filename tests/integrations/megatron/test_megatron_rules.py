"""`attach` in Megatron-core's own optimizers: every policy beside one process, and steps that are left out or fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

import distclip
from distclip.integrations.megatron.parameters import share_names
from tests.integrations.megatron import gpt, rules, training
from tests.integrations.megatron.model import SCALE, Setting
from tests.ranks import World

pytest.importorskip("megatron.core")

POLICIES = [
    distclip.global_norm(1.0),
    distclip.global_norm(0.5, math.inf),
    distclip.value(0.5),
    distclip.per_tensor_norm(0.2),
    distclip.agc(0.02, exclude=["norm"]),
    # "tied" is not in the name that the last stage has for it.
    distclip.group_norm({"in": (r"^(tied|up)\.", 0.05), "norms": ("norm", 0.1)}, 0.3),
    distclip.zclip(cap=30.0, warmup=2),
    distclip.adagc(1.04, warmup=1),
]
SETTINGS = {
    "data parallel": (4, Setting()),
    "tp x pp": (4, Setting(tp=2, pp=2)),
    "experts": (4, Setting(tp=2, ep=2)),
    "experts that are cut": (4, Setting(tp=2, ep=2, etp=2)),
    "bf16": (4, Setting(tp=2, pp=2, dtype="bf16")),
    "fp16 experts": (4, Setting(ep=2, dtype="fp16")),
    "distributed": (4, Setting(tp=2, distributed=True)),
    "distributed bf16": (4, Setting(pp=2, dtype="bf16", distributed=True)),
    "distributed fp16": (4, Setting(pp=2, ep=2, dtype="fp16", distributed=True)),
    "two stages": (2, Setting(pp=2, dtype="fp16")),
    "two slices": (2, Setting(dtype="bf16", distributed=True)),
}
FP16 = [name for name, (_, setting) in SETTINGS.items() if setting.dtype == "fp16"]
SOME = ["tp x pp", "fp16 experts", "distributed bf16"]


@pytest.mark.parametrize("name", SETTINGS)
def test_policies_step_as_one_process(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(training.train, setting=setting, policies=POLICIES)


@pytest.mark.parametrize("name", SETTINGS)
def test_not_finite_on_one_rank(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.nonfinite, setting=setting)


@pytest.mark.parametrize("name", SOME)
def test_too_many_skipped_steps(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.gives_up, setting=setting)


@pytest.mark.parametrize("name", SOME)
def test_policy_leaves_a_step_out(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.leaves_out, setting=setting)


@pytest.mark.parametrize("name", FP16)
def test_growing_loss_scale(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.grows, setting=setting)


@pytest.mark.parametrize("distributed", [False, True])
def test_loss_scales_of_a_chain_back_off_together(ranks: Callable[[int], World], distributed: bool) -> None:
    setting = Setting(ep=2, dtype="fp16", distributed=distributed)
    assert ranks(4).run(rules.backs_off, setting=setting, how="attach") == [(False, [SCALE / 2, SCALE / 2])] * 4
    # Theirs part, and without a distributed optimizer some ranks make the step and the others do not.
    theirs = ranks(4).run(rules.backs_off, setting=setting, how="theirs")
    assert theirs[3] == (False, [SCALE, SCALE / 2])
    assert theirs[0] == ((False, [SCALE, SCALE / 2]) if distributed else (True, [SCALE, SCALE]))


@pytest.mark.parametrize("name", ["bf16", "distributed bf16"])
def test_weights_that_were_moved(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.looks_again, setting=setting)


@pytest.mark.parametrize("name", SOME)
def test_a_rank_that_fails(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.fails, setting=setting)


@pytest.mark.parametrize("name", SOME)
def test_optimizer_is_given_back(ranks: Callable[[int], World], name: str) -> None:
    size, setting = SETTINGS[name]
    ranks(size).run(rules.gives_back, setting=setting)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stage_without_parameters(ranks: Callable[[int], World], dtype: str, distributed: bool) -> None:
    ranks(2).run(rules.frozen, setting=Setting(pp=2, dtype=dtype, distributed=distributed))


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("policy", range(4))
def test_gpt_with_a_tied_embedding(ranks: Callable[[int], World], policy: int, distributed: bool) -> None:
    tied = distclip.group_norm({"embedding": ("^embedding", 0.1)}, 0.3)
    policies = [distclip.global_norm(0.5), distclip.per_tensor_norm(0.05), distclip.agc(0.02), tied]
    ranks(2).run(gpt.trains, policy=policies[policy], distributed=distributed)


def test_bad_input(ranks: Callable[[int], World]) -> None:
    ranks(2).run(rules.refuses)


def test_a_tied_embedding_that_nobody_can_tell() -> None:
    told = [[("a", True), ("b", True)], [("c", False)]]
    with pytest.raises(distclip.ArgumentError, match="a, b are embeddings that other stages have copies of"):
        share_names([], told)
