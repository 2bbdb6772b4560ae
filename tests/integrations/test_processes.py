"""How the launcher's processes end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.test_launcher import ROOT, environment

pytest.importorskip("hydra")

LEAVES = """
from pathlib import Path

import torch
import torch.distributed as dist

import processes

store = dist.FileStore("store")
dist.init_process_group("gloo", store=store, rank=processes.RANK, world_size=processes.WORLD)
ready = Path("ready")
if processes.RANK == 1:
    torch.randn(2000, 2000).svd()
    ready.touch()
processes.leave()
assert ready.exists()
assert not dist.is_initialized()
"""


def test_no_rank_leaves_before_the_others(tmp_path: Path) -> None:
    """Torch's threads have the time to let go of what they were given: they abort a process that goes too early."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES],
            cwd=tmp_path,
            env=environment(RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=f"{ROOT / 'launch'}:{ROOT}"),
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
