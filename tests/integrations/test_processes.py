"""How the launcher's processes end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.test_launcher import ROOT, environment

pytest.importorskip("hydra")

# Python would abort if one of gloo's threads took its turn while it shuts down; here threads get none by the clock.
LEAVES = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import processes

sys.setswitchinterval(100)
tensor, other, held, references = torch.ones(2), torch.ones(2), [], []
for i in range(10):
    store = dist.FileStore(f"store{i}")
    dist.init_process_group("gloo", store=store, rank=processes.RANK, world_size=processes.WORLD)
    held += [dist.group.WORLD, dist.new_group()]
    dist.all_reduce(tensor, group=held[-1])
    processes.leave()
    references.append(sys.getrefcount(tensor) - sys.getrefcount(other))
Path(f"rank{processes.RANK}").write_text(str(references))
"""


def test_no_thread_holds_a_tensor_at_the_end(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES],
            cwd=tmp_path,
            env=environment(RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=f"{ROOT / 'launch'}:{ROOT}"),
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == [str([0] * 10)] * 2
