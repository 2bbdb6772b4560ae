"""Check the log of a run that a framework has recorded with `on_bind=partial(Recorder, ...)`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.ranks import gather_from_ranks

__all__ = ["check_log", "lr_of"]


def check_log(run: Path, losses: Sequence[float], num_micro_batches: int = 1) -> None:
    """Check the recorded losses against those of the batches on this rank, and the learning rates."""
    gathered = torch.tensor(gather_from_ranks(list(losses)), dtype=torch.float64).mean(0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(lines) >= 2
    expected = gathered.view(-1, num_micro_batches).mean(1).tolist()
    assert [line["loss"] for line in lines] == pytest.approx(expected[: len(lines)], rel=1e-5)
    assert all(line["lr"] == pytest.approx(lr_of(i)) for i, line in enumerate(lines))


def lr_of(step: int) -> float:
    """Return the learning rate of a step, which a scheduler halves after each."""
    return float(0.1 * 0.5**step)
