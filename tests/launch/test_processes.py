"""Start the right number of processes, and end them together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, environment

pytest.importorskip("hydra")

# nvidia-smi of a machine with four GPUs.
NVIDIA_SMI = "#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i: H100; done\n"


@pytest.mark.parametrize(
    ("has_gpus", "variables", "expected"),
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
def test_number_of_ranks(tmp_path: Path, has_gpus: bool, variables: dict[str, str], expected: int | str) -> None:
    if has_gpus:
        (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
        (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}"} | variables
    command = ["bash", "-euo", "pipefail", "-c", f'source {ROOT}/launch/ranks.sh; echo "$NPROC $OMP_NUM_THREADS"']
    num_ranks, num_threads = subprocess.check_output(command, env=env, text=True).split()
    assert num_ranks == str(expected)
    processors = os.sysconf("SC_NPROCESSORS_ONLN")
    assert int(num_threads) == (max(1, processors // expected) if isinstance(expected, int) else 1)


LEAVE = """
from pathlib import Path

import torch
import torch.distributed as dist

from job import processes

store = dist.FileStore("store")
dist.init_process_group("gloo", store=store, rank=processes.RANK, world_size=processes.WORLD_SIZE)
ready = Path("ready")
if processes.RANK == 1:
    torch.randn(2000, 2000).svd()
    ready.touch()
processes.leave()
assert ready.exists()
assert not dist.is_initialized()
"""


def test_ranks_leave_together(tmp_path: Path) -> None:
    # A process that exits before gloo's threads have released their tensors would abort.
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE],
            cwd=tmp_path,
            env=environment(RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=f"{ROOT / 'launch'}:{ROOT}"),
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
