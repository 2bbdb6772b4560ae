"""Accelerate for real, on two ranks, beside one process in float64 on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.loops import in_accelerate
from tests.integrations.loops.plain import POLICIES
from tests.ranks import World

pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'distclip[hf]'")

KINDS = ["ddp", "fsdp2"]
"""FSDP1 does not start on a CPU: Accelerate passes it a device that it refuses."""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process(ranks: Callable[[int], World], kind: str, policy: str) -> None:
    ranks(2).run(in_accelerate.trains, kind=kind, policy=POLICIES[policy])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(ranks: Callable[[int], World], kind: str) -> None:
    ranks(2).run(in_accelerate.trains, kind=kind, policy=POLICIES["model"], ga=2)


@pytest.mark.parametrize(("kind", "rule"), [*((kind, "skip") for kind in KINDS), ("fsdp2", "raise")])
def test_a_nan_on_one_rank_is_seen_by_all(ranks: Callable[[int], World], kind: str, rule: str) -> None:
    ranks(2).run(in_accelerate.skips, kind=kind, rule=rule)


@pytest.mark.parametrize("kind", ["ddp"])
def test_a_checkpoint_has_the_memory(ranks: Callable[[int], World], kind: str, tmp_path: Path) -> None:
    ranks(2).run(in_accelerate.resumes, kind=kind, folder=str(tmp_path))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_unscales_once(ranks: Callable[[int], World], fused: bool) -> None:
    ranks(2).run(in_accelerate.scales, fused=fused)


@pytest.mark.parametrize("patched", [False, True])
def test_two_optimizers_under_one_scaler(ranks: Callable[[int], World], patched: bool) -> None:
    ranks(2).run(in_accelerate.two_optimizers, patched=patched)


def test_an_overflow_with_two_optimizers(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.overflows_of_two)


@pytest.mark.xfail(strict=True, reason="Open: under DDP what one rank alone finds wrong is raised on that rank alone")
def test_what_is_refused(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.refuses)


def test_accelerate_alone_makes_an_infinity_nan(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.infinite)


def test_the_example(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.examples)
