"""Continue jobs that were killed at any stage, that lost ranks, or whose newest checkpoint is damaged."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from job.elastic import find_job_directory, handshake
from tests.launch.jobs import STATEFUL, agent_store, read_rows, succeed, train, train_again

SETTINGS = [*STATEFUL, "steps=8", "checkpoint.every=2", "data.held_out=0.02", "log=quiet"]
KILLS = ["forward:1:3", "in the all-reduce:0:9", "after the all-reduce:1:2", "checkpoint:1:3", "rename:0:1", "log:0:2"]
"""Kills of one attempt after another, as `tests.launch.kills` reads them."""


def read_lines(run: Path) -> list[dict[str, object]]:
    """Return the lines of the log, each of which must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    cwd = tmp_path_factory.mktemp("whole")
    succeed(train(cwd, 2, *SETTINGS, "hydra.run.dir=run"))
    return cwd / "run"


def test_restarted_job_continues_in_its_directory(whole: Path, tmp_path: Path) -> None:
    """The ranks are killed at every stage, and find the run directory, whose default name has the time."""
    store = agent_store()
    for kill in KILLS:
        done = train_again(tmp_path, store, 2, *SETTINGS, KILL=kill)
        assert done.returncode < 0, done.stdout + done.stderr
        (run,) = (tmp_path / "outputs").iterdir()
        read_lines(run)
        for checkpoint in run.glob("checkpoints/*"):
            assert checkpoint.suffix == ".unfinished" or (checkpoint / ".metadata").exists()
    succeed(train_again(tmp_path, store, 2, *SETTINGS))
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [run.name]
    assert {row["step"]: row for row in read_rows(run)} == {row["step"]: row for row in read_rows(whole)}
    assert sorted(path.name for path in run.glob("checkpoints/*")) == [f"step_00000{i}" for i in (2, 4, 6, 8)]


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
    assert again.returncode == 1
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
