"""Lightning for real: Trainer and Fabric on two ranks, beside one process in float64 on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.lightning import in_lightning
from tests.integrations.plain import POLICIES
from tests.ranks import World

pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'distclip[lightning]'")

KINDS = ["ddp", "fsdp", "fsdp2"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_steps_as_one_process(ranks: Callable[[int], World], kind: str, policy: str) -> None:
    ranks(2).run(in_lightning.trains, kind=kind, policy=POLICIES[policy])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(ranks: Callable[[int], World], kind: str) -> None:
    ranks(2).run(in_lightning.trains, kind=kind, policy=POLICIES["model"], ga=2)


@pytest.mark.parametrize(("kind", "rule"), [*((kind, "skip") for kind in KINDS), ("fsdp2", "raise")])
def test_a_nan_on_one_rank_is_seen_by_all(ranks: Callable[[int], World], kind: str, rule: str) -> None:
    ranks(2).run(in_lightning.skips, kind=kind, rule=rule)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_has_the_memory(ranks: Callable[[int], World], kind: str, tmp_path: Path) -> None:
    ranks(2).run(in_lightning.resumes, kind=kind, folder=str(tmp_path))


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_is_unscaled_once(ranks: Callable[[int], World], fused: bool) -> None:
    ranks(2).run(in_lightning.scales, fused=fused)


def test_several_optimizers_have_a_norm_each(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.two_optimizers)


def test_several_optimizers_see_a_nan_on_one_rank(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.two_see_a_nan)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_all_reduce(ranks: Callable[[int], World], kind: str) -> None:
    ranks(2).run(in_lightning.communicates, kind=kind)


def test_a_step_without_a_loss(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.no_loss)


def test_a_recorder(ranks: Callable[[int], World], tmp_path: Path) -> None:
    ranks(2).run(in_lightning.records, folder=str(tmp_path))


def test_what_is_refused(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.refuses)


def test_lightning_alone_refuses_norms_under_fsdp(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.refused_by_lightning)


def test_its_own_model(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.its_own_model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fabric_steps_as_one_process(ranks: Callable[[int], World], kind: str, policy: str) -> None:
    ranks(2).run(in_lightning.fabric, kind=kind, policy=POLICIES[policy])


def test_fabric_fp16(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.fabric_scales)


def test_fabric_alone_forgets_what_is_not_finite(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.fabric_forgets)


def test_the_examples(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_lightning.examples)
