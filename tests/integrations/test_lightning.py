"""Lightning for real: Trainer and Fabric on two ranks, beside one process in float64 on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import distclip
from tests.integrations.loops import in_lightning
from tests.ranks import World

pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'distclip[lightning]'")

POLICIES = {
    "model": distclip.global_norm(0.5),
    "tensor": distclip.per_tensor_norm(0.2),
    "adaptive": distclip.zclip(cap=1.0, warmup=1),
}
KINDS = ["ddp", "fsdp", "fsdp2"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    """A world of this file alone: Lightning leaves much behind in a process."""
    world = World(2)
    yield world
    world.stop()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_steps_as_one_process(ranks: World, kind: str, policy: str) -> None:
    ranks.run(in_lightning.trains, kind=kind, policy=POLICIES[policy])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(ranks: World, kind: str) -> None:
    ranks.run(in_lightning.trains, kind=kind, policy=POLICIES["model"], ga=2)


@pytest.mark.parametrize(("kind", "rule"), [*((kind, "skip") for kind in KINDS), ("fsdp2", "raise")])
def test_a_nan_on_one_rank_is_seen_by_all(ranks: World, kind: str, rule: str) -> None:
    ranks.run(in_lightning.skips, kind=kind, rule=rule)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_has_the_memory(ranks: World, kind: str, tmp_path: Path) -> None:
    ranks.run(in_lightning.resumes, kind=kind, folder=str(tmp_path))


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_is_unscaled_once(ranks: World, fused: bool) -> None:
    ranks.run(in_lightning.scales, fused=fused)


def test_several_optimizers_have_a_norm_each(ranks: World) -> None:
    ranks.run(in_lightning.two_optimizers)


def test_a_step_without_a_loss(ranks: World) -> None:
    ranks.run(in_lightning.no_loss)


def test_a_recorder(ranks: World, tmp_path: Path) -> None:
    ranks.run(in_lightning.records, folder=str(tmp_path))


def test_what_is_refused(ranks: World) -> None:
    ranks.run(in_lightning.refuses)


def test_lightning_alone_refuses_norms_under_fsdp(ranks: World) -> None:
    ranks.run(in_lightning.refused_by_lightning)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fabric_steps_as_one_process(ranks: World, kind: str, policy: str) -> None:
    ranks.run(in_lightning.fabric, kind=kind, policy=POLICIES[policy])


def test_fabric_fp16(ranks: World) -> None:
    ranks.run(in_lightning.fabric_scales)


def test_fabric_alone_forgets_what_is_not_finite(ranks: World) -> None:
    ranks.run(in_lightning.fabric_forgets)


def test_the_examples(ranks: World) -> None:
    ranks.run(in_lightning.examples)
