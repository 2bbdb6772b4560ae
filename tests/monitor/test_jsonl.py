"""Append to a file of lines that a crash may have left at any byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distclip.monitor.jsonl import JsonLines

ROWS = [{"step": 1, "note": "ü"}, {"step": 2, "norms": [0.25] * 40_000}, {"step": 3}]


@pytest.mark.parametrize("cut", [0, 1, 2, 8, 20, 30, 70_000, 150_000, 200_036])
def test_torn_line_is_removed(tmp_path: Path, cut: int) -> None:
    """A step whose line is torn is the only one that is lost, whatever its length."""
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).append(ROWS)
    content = path.read_bytes()
    left = content[: len(content) - cut]
    path.write_bytes(left)
    JsonLines(path).append([{"step": 9}])
    # A line that lacks its line break alone is whole.
    num_whole = left.count(b"\n") + (cut == 1)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [*ROWS[:num_whole], {"step": 9}]


def test_text_of_other_programs_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("epoch 1, loss 2.3")
    JsonLines(path).append([{"step": 1}])
    assert path.read_text() == 'epoch 1, loss 2.3\n{"step": 1}\n'
