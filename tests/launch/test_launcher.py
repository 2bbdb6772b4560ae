"""The real launcher: every way to lay out the ranks trains every model as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
MODELS = {"rnn": [], "gpt": ["model=gpt"], "mlp": ["model=mlp", "data=digits"]}
ZERO = ["zero0", "zero2", "zero3"] if find_spec("deepspeed") else []
TWO_RANKS = ["ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2_tp", "pp", *ZERO]
FOUR_RANKS = ["hsdp", "fsdp2_tp", "pp"]  # what has two axes
EXPERIMENTS = ["rescue", "bad_label", "regression", "lstm", "gpt", "direction"]
STEPS = 5
FILES = {"config.yaml", "metrics.jsonl", "summary.json"}


def environment(**more: str) -> dict[str, str]:
    """For a launcher that is to start this interpreter: what another one has told these tests is left out."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return clean | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def launch(cwd: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`launch/torchrun.sh` as a user calls it, but from anywhere and with this interpreter."""
    env = environment(NPROC=str(ranks))
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *overrides]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)


def rows(run: Path) -> list[dict[str, Any]]:
    """By step, its numbers; but not when it was."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    numbers = [{k: v for k, v in line.items() if not isinstance(v, list | dict)} for line in lines if "step" in line]
    return [{k: v for k, v in row.items() if k != "time"} for row in numbers]


@dataclass
class Job:
    """What one call left: its output and the directory it ran in."""

    cwd: Path
    out: str

    def files(self) -> set[str]:
        """Every file under the one run directory, relative to it."""
        (top,) = (self.cwd / "outputs").iterdir()
        assert [path.name for path in self.cwd.iterdir()] == ["outputs"]
        return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}

    def rows(self, run: str) -> list[dict[str, Any]]:
        (path,) = self.cwd.glob(f"outputs/*/{run}")
        return rows(path)

    def held_out(self, run: str) -> float:
        (path,) = self.cwd.glob(f"outputs/*/{run}/summary.json")
        return float(json.loads(path.read_text(encoding="utf-8"))["held_out"])


def train_all_models(tmp_path_factory: pytest.TempPathFactory, ranks: int, *overrides: str) -> Job:
    """One launch for many runs: a Hydra multirun over layouts, in each a comparison of models."""
    cwd = tmp_path_factory.mktemp("job")
    compare = "+compare={" + ",".join(f"{name}:{changes}" for name, changes in MODELS.items()) + "}"
    job = launch(cwd, ranks, *overrides, compare, f"steps={STEPS}", "data.held_out=0.02", "log.every=2")
    assert job.returncode == 0, job.stdout + job.stderr
    return Job(cwd, job.stdout)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train_all_models(tmp_path_factory, 1, "parallel=single")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train_all_models(tmp_path_factory, 2, "-m", f"parallel={','.join(TWO_RANKS)}")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return train_all_models(tmp_path_factory, 4, "-m", f"parallel={','.join(FOUR_RANKS)}")


def assert_trains_as(single: Job, job: Job, number: int, model: str) -> None:
    found, expected = job.rows(f"{number}/{model}"), single.rows(model)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row, one in zip(found, expected, strict=True):
        assert row.keys() == one.keys()
        assert {k: row[k] for k in row} == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert job.held_out(f"{number}/{model}") == pytest.approx(single.held_out(model), rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", TWO_RANKS)
def test_two_ranks_train_as_one(single: Job, two: Job, parallel: str, model: str) -> None:
    assert_trains_as(single, two, TWO_RANKS.index(parallel), model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", FOUR_RANKS)
def test_four_ranks_train_as_one(single: Job, four: Job, parallel: str, model: str) -> None:
    assert_trains_as(single, four, FOUR_RANKS.index(parallel), model)


def test_the_losses_fall_and_the_norms_are_clipped(single: Job) -> None:
    """Otherwise the agreement above would say nothing."""
    for model in MODELS:
        found = single.rows(model)
        assert found[-1]["loss"] < found[0]["loss"]
    assert any(row["clipped"] for model in MODELS for row in single.rows(model))


def test_only_rank_0_writes_and_only_once(single: Job, two: Job) -> None:
    assert single.files() == {f"{model}/{file}" for model in MODELS for file in FILES}
    jobs = {f"{n}/{model}/{file}" for n in range(len(TWO_RANKS)) for model in MODELS for file in FILES}
    assert two.files() == jobs | {"multirun.yaml"}
    assert two.out.count("held-out loss") == len(TWO_RANKS)


def test_a_pipe_gets_lines_and_no_progress_bar(two: Job) -> None:
    assert "\r" not in two.out and "\x1b" not in two.out
    assert two.out.count(f"step {STEPS}/{STEPS}") == len(TWO_RANKS) * len(MODELS)


def test_a_refusal_comes_from_every_rank_before_anything_starts(tmp_path: Path) -> None:
    done = launch(tmp_path, 2, "batch=5")
    assert done.returncode != 0
    assert "batch=5 does not split over 2 data-parallel ranks: write batch=6" in done.stderr
    assert not done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("world", "overrides", "said"),
    [
        (1, "stepz=3", "Key 'stepz' is not in struct"),
        (1, "steps=abc", "Value 'abc' of type 'str' could not be converted to Integer"),
        (1, "clip.max_norm=-1", "max_norm=-1"),
        (1, "data=digits", "write model=rnn data=topics"),
        (3, "parallel=hsdp batch=30", "NPROC=2"),
        (2, "parallel=single", "write parallel=ddp"),
        (1, "inject=spike inject.rank=1", "inject.rank=1 of 1 rank(s): write 0 to 0"),
        (1, "inject=one_nan inject.step=9 steps=5", "inject.step=9: write one of the steps 1 to 5"),
        (1, "inject=one_inf inject.parameter=head", "is in no name: the model has 0.weight, 1.cell."),
        (1, "resume=nowhere", "has no checkpoint: write the directory of a run with checkpoint.every=N"),
    ],
)
def test_what_is_wrong_is_said_before_a_process_group_starts(
    tmp_path: Path, world: int, overrides: str, said: str
) -> None:
    # One rank of a world whose others never come: a process group would wait for them.
    env = os.environ | {"RANK": "1", "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *overrides.split()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A few steps of all those on data that can be held out, in one launch; the flag between overrides."""
    cwd = tmp_path_factory.mktemp("job")
    names = f"experiment={','.join(EXPERIMENTS)}"
    job = launch(cwd, 1, "parallel=single", names, "--multirun", "steps=2", "batch=8", "data.held_out=0.02")
    assert job.returncode == 0, job.stdout + job.stderr
    return Job(cwd, job.stdout)


def test_rescue_sets_three_runs_side_by_side(experiments: Job) -> None:
    row = next(line for line in experiments.out.splitlines() if "held-out loss" in line)
    clipped, unclipped, control = (float(cell) for cell in row.strip(" │").split("│")[1:])
    assert clipped == unclipped != control  # nothing is clipped yet in the first steps


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_ends_in_a_table_and_what_it_shows(experiments: Job, name: str) -> None:
    said = OmegaConf.load(ROOT / "conf/experiment" / f"{name}.yaml")
    (directory,) = experiments.cwd.glob(f"outputs/*/{EXPERIMENTS.index(name)}")
    assert {path.name for path in directory.iterdir()} == {each.replace(" ", "_") for each in said.compare}
    assert said.note in experiments.out


def test_direction_writes_its_angles(experiments: Job) -> None:
    number = EXPERIMENTS.index("direction")
    assert [row["angle"] for row in experiments.rows(f"{number}/unclipped")] == [0, 0]
    turned = [row["angle"] for row in experiments.rows(f"{number}/value_0.01")]
    assert min(turned) > 1
    (path,) = experiments.cwd.glob(f"outputs/*/{number}/value_0.01/summary.json")
    assert json.loads(path.read_text(encoding="utf-8"))["angle_max"] == max(turned)


def test_the_cliff_leaves_a_picture(tmp_path: Path) -> None:
    done = launch(tmp_path, 2, "experiment=cliff", "steps=3")
    assert done.returncode == 0, done.stderr
    job = Job(tmp_path, done.stdout)
    assert job.files() == {
        f"{run}/{file}" for run in ("norm_1", "unclipped") for file in (*FILES, "figures/cliff.json")
    }
    assert "solved" in done.stdout and "of a blind guess" not in done.stdout


def test_a_step_again_tells_a_transient_fault_from_bad_data(tmp_path: Path) -> None:
    """A gradient spoiled at step 33, and the bad label's second pass at step 39."""
    bad = ["data=diabetes", "data.bad_label=1000", "batch=16", "optim.lr=0.01"]
    one = ["parallel=single", "checkpoint.every=3", "steps=40", "probe.step=33", "hydra.run.dir=run"]
    first = launch(tmp_path, 1, "experiment=one_spike", *bad, *one)
    assert first.returncode == 0, first.stderr
    assert "steps until it is back" in first.stdout
    again = launch(tmp_path, 1, "parallel=single", "resume=run/norm_1", "replay=33,39", "--multirun")
    assert again.returncode == 0, again.stderr
    fault, data = (line for line in again.stdout.splitlines() if " then, " in line)
    assert fault.startswith("step 33: norm ") and "Not again: a transient fault" in fault
    assert "after the forward pass, whose loss is the same" in fault
    assert data.startswith("step 39: norm ") and "The same norm again: the batch (samples " in data
    words = data.replace(",", "").replace(";", "").split()
    assert words[words.index("norm") + 1] == words[words.index("norm") + 3]  # bit for bit
    assert float(words[words.index("norm") + 1]) > 100
