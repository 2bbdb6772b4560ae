"""How many processes the launchers start, and how these end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_launcher import ROOT, environment

pytest.importorskip("hydra")

SMI = "#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: H100; done\n"
"""Of a machine with four GPUs."""


@pytest.mark.parametrize(
    ("gpus", "told", "ranks"),
    [
        (True, {}, 4),
        (True, {"CUDA_VISIBLE_DEVICES": "1,3"}, 2),
        (True, {"CUDA_VISIBLE_DEVICES": "2"}, 1),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, 2),
        (True, {"NPROC": "3"}, 3),
        (False, {}, 2),
        (False, {"NPROC": "1"}, 1),
        (False, {"NPROC": "gpu"}, "gpu"),
    ],
)
def test_how_many_start(tmp_path: Path, gpus: bool, told: dict[str, str], ranks: int | str) -> None:
    if gpus:
        (tmp_path / "nvidia-smi").write_text(SMI)
        (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}"} | told
    command = ["bash", "-euo", "pipefail", "-c", f'source {ROOT}/launch/ranks.sh; echo "$NPROC $OMP_NUM_THREADS"']
    started, threads = subprocess.check_output(command, env=env, text=True).split()
    assert started == str(ranks)
    processors = os.sysconf("SC_NPROCESSORS_ONLN")
    assert int(threads) == (max(1, processors // ranks) if isinstance(ranks, int) else 1)


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
