"""Accelerate for real, on two ranks, beside one process in float64 on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.accelerate import in_accelerate
from tests.integrations.plain import POLICIES
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


@pytest.mark.parametrize(("kind", "rule"), [(kind, rule) for kind in KINDS for rule in ("skip", "raise")])
def test_a_nan_on_one_rank_is_seen_by_all(ranks: Callable[[int], World], kind: str, rule: str) -> None:
    ranks(2).run(in_accelerate.skips, kind=kind, rule=rule)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_rank_gets_wrong_is_refused_by_all(ranks: Callable[[int], World], kind: str) -> None:
    ranks(2).run(in_accelerate.refuses, kind=kind)


def test_models_that_one_rank_alone_has_are_refused(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.refuses_unequal_models)


@pytest.mark.parametrize("kind", KINDS)
def test_one_all_reduce(ranks: Callable[[int], World], kind: str) -> None:
    ranks(2).run(in_accelerate.communicates, kind=kind)


def test_local_sgd(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.local_sgd)


def test_accelerate_alone_makes_an_infinity_nan(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.infinite)


def test_its_own_script(ranks: Callable[[int], World]) -> None:
    ranks(2).run(in_accelerate.its_own_script)
