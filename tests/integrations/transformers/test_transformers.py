"""The Trainer of transformers for real, on two ranks, beside one process in float64 on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.transformers import in_transformers
from tests.integrations.plain import POLICIES
from tests.ranks import World

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'distclip[hf]'")
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'distclip[hf]'")


KINDS = ["ddp", "fsdp2", "tp"]
"""Of "tp" the first layer alone is cut: gradients on a mesh, and plain ones, which the Trainer treats apart."""


@pytest.mark.parametrize("ga", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process(ranks: Callable[[int], World], tmp_path: Path, kind: str, ga: int) -> None:
    ranks(2).run(in_transformers.trains, policy=POLICIES["model"], folder=str(tmp_path), kind=kind, ga=ga)


@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_norms_of_whole_tensors(ranks: Callable[[int], World], tmp_path: Path, kind: str) -> None:
    ranks(2).run(in_transformers.trains, policy=POLICIES["tensor"], folder=str(tmp_path), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_max_grad_norm_is_left_out_of_account(ranks: Callable[[int], World], tmp_path: Path, kind: str) -> None:
    ranks(2).run(in_transformers.trains, policy=POLICIES["adaptive"], folder=str(tmp_path), kind=kind, bound=0.0)


@pytest.mark.parametrize("rule", ["skip", "raise"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinity_on_one_rank_is_seen_by_all(
    ranks: Callable[[int], World], tmp_path: Path, kind: str, rule: str
) -> None:
    ranks(2).run(in_transformers.skips, folder=str(tmp_path), kind=kind, rule=rule)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_scaler_unscales_once(ranks: Callable[[int], World], tmp_path: Path, kind: str) -> None:
    ranks(2).run(in_transformers.scales, folder=str(tmp_path), kind=kind)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_overflow_is_skipped_by_all(ranks: Callable[[int], World], tmp_path: Path, kind: str) -> None:
    ranks(2).run(in_transformers.skips, folder=str(tmp_path), kind=kind, rule="raise", scale=1024.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_has_the_memory(ranks: Callable[[int], World], tmp_path: Path, kind: str) -> None:
    ranks(2).run(in_transformers.resumes, folder=str(tmp_path), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_rank_gets_wrong_is_refused_by_all(ranks: Callable[[int], World], tmp_path: Path, kind: str) -> None:
    ranks(2).run(in_transformers.refuses_together, folder=str(tmp_path), kind=kind)


@pytest.mark.parametrize("job", ["trains_again", "poisoned_by_transformers", "refuses"])
def test_the_rest(ranks: Callable[[int], World], tmp_path: Path, job: str) -> None:
    ranks(2).run(getattr(in_transformers, job), folder=str(tmp_path))


def test_a_model_of_its_own(ranks: Callable[[int], World], tmp_path: Path) -> None:
    ranks(2).run(in_transformers.a_model_of_its_own, folder=str(tmp_path))
