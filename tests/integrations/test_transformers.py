"""The Trainer of transformers for real, on two ranks, beside one process in float64 on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import distclip
from tests.integrations.loops import in_transformers
from tests.ranks import World

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'distclip[hf]'")
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'distclip[hf]'")


@pytest.mark.parametrize("ga", [1, 2])
def test_steps_as_one_process(ranks: Callable[[int], World], tmp_path: Path, ga: int) -> None:
    ranks(2).run(in_transformers.trains, policy=distclip.global_norm(0.5), folder=str(tmp_path), ga=ga)


def test_max_grad_norm_is_left_out_of_account(ranks: Callable[[int], World], tmp_path: Path) -> None:
    ranks(2).run(in_transformers.trains, policy=distclip.zclip(cap=1.0, warmup=1), folder=str(tmp_path), bound=0.0)


@pytest.mark.parametrize("rule", ["skip", "raise"])
def test_a_nan_on_one_rank_is_seen_by_all(ranks: Callable[[int], World], tmp_path: Path, rule: str) -> None:
    ranks(2).run(in_transformers.skips, folder=str(tmp_path), rule=rule)


def test_a_scaler_unscales_once(ranks: Callable[[int], World], tmp_path: Path) -> None:
    ranks(2).run(in_transformers.scales, folder=str(tmp_path))


@pytest.mark.parametrize("job", ["resumes", "trains_again", "poisoned_by_transformers", "refuses", "examples"])
def test_the_rest(ranks: Callable[[int], World], tmp_path: Path, job: str) -> None:
    ranks(2).run(getattr(in_transformers, job), folder=str(tmp_path))
