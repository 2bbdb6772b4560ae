"""Train in every layout: all must train as one process does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch.jobs import FILES, Job, compare, list_files, succeed, torchrun, train

MODELS = {"rnn": [], "gpt": ["model=gpt"], "mlp": ["model=mlp", "data=digits"]}
ZERO = ["zero0", "zero2", "zero3"] if find_spec("deepspeed") else []
TWO_RANKS = ["ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2_tp", "pp", *ZERO]
# Layouts with two axes.
FOUR_RANKS = ["hsdp", "fsdp2_tp", "pp"]
STEPS = 5
# All models in each layout, in one job.
OVERRIDES = [compare(MODELS), f"steps={STEPS}", "data.held_out=0.02", "log.every=2"]


def find_job(cwd: Path, out: str) -> Job:
    """Return the one job that was run in a folder."""
    (directory,) = (cwd / "outputs").iterdir()
    return Job(directory, out)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cwd = tmp_path_factory.mktemp("single")
    return find_job(cwd, succeed(train(cwd, 1, "parallel=single", *OVERRIDES)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cwd = tmp_path_factory.mktemp("two")
    return find_job(cwd, succeed(torchrun(cwd, 2, "-m", f"parallel={','.join(TWO_RANKS)}", *OVERRIDES)))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cwd = tmp_path_factory.mktemp("four")
    return find_job(cwd, succeed(train(cwd, 4, "-m", f"parallel={','.join(FOUR_RANKS)}", *OVERRIDES)))


def assert_equal_runs(single: Job, job: Job, number: int, model: str) -> None:
    """Compare the run of a model in job `number` of a multirun with the run in one process."""
    rows, expected = job.rows(f"{number}/{model}"), single.rows(model)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected_row in zip(rows, expected, strict=True):
        assert row.keys() == expected_row.keys()
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-5)
    held_out = job.summary(f"{number}/{model}")["held_out"]
    assert held_out == pytest.approx(single.summary(model)["held_out"], rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", TWO_RANKS)
def test_two_ranks_train_as_one_process(single: Job, two: Job, parallel: str, model: str) -> None:
    assert_equal_runs(single, two, TWO_RANKS.index(parallel), model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("parallel", FOUR_RANKS)
def test_four_ranks_train_as_one_process(single: Job, four: Job, parallel: str, model: str) -> None:
    assert_equal_runs(single, four, FOUR_RANKS.index(parallel), model)


@pytest.mark.quick
def test_losses_fall_and_norms_are_clipped(single: Job) -> None:
    """Guards the tests above, which would also pass if nothing were trained or clipped."""
    for model in MODELS:
        rows = single.rows(model)
        assert rows[-1]["loss"] < rows[0]["loss"]
    assert any(row["clipped"] for model in MODELS for row in single.rows(model))


def test_only_rank_0_writes(single: Job, two: Job) -> None:
    assert single.files() == {f"{model}/{file}" for model in MODELS for file in FILES}
    runs = {f"{n}/{model}/{file}" for n in range(len(TWO_RANKS)) for model in MODELS for file in FILES}
    assert two.files() == runs | {"multirun.yaml"}
    assert two.out.count("held-out loss") == len(TWO_RANKS)


def test_pipe_gets_no_progress_bar(two: Job) -> None:
    assert "\r" not in two.out
    assert "\x1b" not in two.out
    assert two.out.count(f"step {STEPS}/{STEPS}") == len(TWO_RANKS) * len(MODELS)


def test_invalid_settings_end_all_ranks(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "batch=5")
    assert done.returncode != 0
    assert "batch=5: not divisible by 2 data-parallel ranks. Use batch=6" in done.stderr
    assert not done.stdout
    assert not list_files(tmp_path)
