"""Audit a layout with the training job."""

from __future__ import annotations

from pathlib import Path

from tests.launch.jobs import train


def test_audit_prints_the_table_and_does_not_train(tmp_path: Path) -> None:
    done = train(tmp_path, 2, "audit=true", "parallel=fsdp2")
    assert done.returncode == 0, done.stderr
    assert "sharded on dim 0 over dp (2 ranks)" in done.stdout
    assert done.stdout.count("No problem found.") == 1
    assert "step " not in done.stdout
    assert not list(tmp_path.rglob("metrics.jsonl"))
