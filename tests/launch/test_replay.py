"""Read the step to repeat from a run's log, and reject steps that cannot be repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from job import replay

pytestmark = pytest.mark.quick


def write_log(run: Path, *lines: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def test_reads_the_last_line_of_a_step(tmp_path: Path) -> None:
    header = {"distclip": "0.1", "format": 1}
    steps = [{"step": step, "norm": step} for step in (1, 2, 3)]
    write_log(tmp_path, header, *steps, header, {"step": 2, "norm": 20}, {"step": 9, "norm": None})
    norms = [replay.read_step(tmp_path, step)[0] for step in (1, 2, 9)]
    assert norms == pytest.approx([1, 20, math.nan], nan_ok=True)
    for missing in (3, 4, 10):
        with pytest.raises(SystemExit, match=f"replay={missing}: not in .*whose last step is 9"):
            replay.read_step(tmp_path, missing)


def test_is_close() -> None:
    assert replay.is_close(1.0, 1.0009)
    assert not replay.is_close(1.0, 1.002)
    assert replay.is_close(math.nan, math.nan)
    assert not replay.is_close(math.nan, 1.0)


@pytest.mark.parametrize(
    ("step", "resume", "message"),
    [
        ("abc", "RUN", "replay=abc: not a step. Use the number of a step"),
        (0, "RUN", "replay=0: not a step. Use the number of a step"),
        (3, None, "Use resume=RUN"),
        (3, "RUN", "no checkpoint there"),
        (5, "saved", "no checkpoint before this step. Use 6 or more"),
        (12, "saved", "replay=12: not in .*whose last step is 9"),
    ],
)
def test_rejects_steps_that_cannot_be_repeated(tmp_path: Path, step: object, resume: str | None, message: str) -> None:
    saved = tmp_path / "saved"
    (saved / "checkpoints/step_000005").mkdir(parents=True)
    write_log(saved, {"step": 9, "norm": 1.0})
    cfg = OmegaConf.create({"replay": step, "resume": resume and str(tmp_path / resume)})
    with pytest.raises(SystemExit, match=message):
        replay.replay_config(cfg)
