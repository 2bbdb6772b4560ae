"""One step again: what is read of the run's log, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import replay


def write(run: Path, *lines: dict[str, Any] | str) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"distclip": "0.1", "format": 1},
        *({"step": step, "norm": step} for step in (1, 2, 3)),
        {"distclip": "0.1", "format": 1},
        {"step": 2, "norm": 20},
        {"step": 9, "norm": None},
    )
    norms = [replay.logged(tmp_path, step)[0] for step in (1, 2, 9)]
    assert norms == pytest.approx([1, 20, math.nan], nan_ok=True)
    for gone in (3, 4, 10):
        with pytest.raises(SystemExit, match=f"replay={gone} is not in .*which ends at step 9"):
            replay.logged(tmp_path, gone)


def test_alike() -> None:
    assert replay.alike(1.0, 1.0009) and not replay.alike(1.0, 1.002)
    assert replay.alike(math.nan, math.nan) and not replay.alike(math.nan, 1.0)


@pytest.mark.parametrize(
    ("step", "resume", "said"),
    [
        ("abc", "RUN", "replay=abc: write the number of a step"),
        (0, "RUN", "replay=0: write the number of a step"),
        (3, None, "write resume=RUN"),
        (3, "RUN", "has no checkpoint"),
        (5, "saved", "no checkpoint before it: write 6 or more"),
        (12, "saved", "replay=12 is not in .*ends at step 9"),
    ],
)
def test_refusals(tmp_path: Path, step: object, resume: str | None, said: str) -> None:
    saved = tmp_path / "saved"
    (saved / "checkpoints/step_000005").mkdir(parents=True)
    write(saved, {"step": 9, "norm": 1.0})
    cfg = OmegaConf.create({"replay": step, "resume": resume and str(tmp_path / resume)})
    with pytest.raises(SystemExit, match=f"(?i){said}"):
        replay.configured(cfg)
