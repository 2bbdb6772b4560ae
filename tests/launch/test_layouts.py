"""Train in every layout: all must train as one process does. Those of DeepSpeed are in `test_deepspeed`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.jobs import FILES, Job, assert_equal_runs, compare, list_files, succeed, torchrun, train

MODELS = {
    "rnn": ["data.length=10"],
    "gpt": ["model=gpt", "model.layers=2", "data.length=10"],
    "mlp": ["model=mlp", "data=digits"],
}
# Layouts with two axes.
FOUR_RANKS = ["hsdp", "fsdp2_tp", "pp"]
STEPS = 5
OVERRIDES = [f"steps={STEPS}", "data.held_out=0.012", "log.every=2"]
# All models in each layout that cuts them in its own way, and one in the others. All are runs of one job, and torchrun
# starts another one.
ON_TWO = [(parallel, model) for parallel in ("tp", "fsdp2_tp", "pp") for model in MODELS]
ON_TWO += [(parallel, "gpt") for parallel in ("fsdp1", "fsdp2", "hsdp")]
ON_FOUR = ("gpt", "mlp")


def find_job(cwd: Path, out: str) -> Job:
    """Return the one job that was run in a folder."""
    (directory,) = (cwd / "outputs").iterdir()
    return Job(directory, out)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cwd = tmp_path_factory.mktemp("single")
    return find_job(cwd, succeed(train(cwd, 1, "parallel=single", compare(MODELS), *OVERRIDES)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cwd = tmp_path_factory.mktemp("two")
    runs = {f"{parallel}-{model}": [f"parallel={parallel}", *MODELS[model]] for parallel, model in ON_TWO}
    return find_job(cwd, succeed(train(cwd, 2, compare(runs), *OVERRIDES)))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cwd = tmp_path_factory.mktemp("four")
    runs = compare({model: MODELS[model] for model in ON_FOUR})
    return find_job(cwd, succeed(train(cwd, 4, "-m", f"parallel={','.join(FOUR_RANKS)}", runs, *OVERRIDES)))


@pytest.mark.parametrize(("parallel", "model"), ON_TWO)
def test_two_ranks_train_as_one_process(single: Job, two: Job, parallel: str, model: str) -> None:
    assert_equal_runs(two.directory / f"{parallel}-{model}", single.directory / model, STEPS)


def test_torchrun_trains_as_one_process(single: Job, tmp_path: Path) -> None:
    """Run the documented script in interpreters that have imported nothing before."""
    job = find_job(tmp_path, succeed(torchrun(tmp_path, 2, "parallel=ddp", *MODELS["rnn"], *OVERRIDES)))
    assert_equal_runs(job.directory, single.directory / "rnn", STEPS)


@pytest.mark.parametrize("model", ON_FOUR)
@pytest.mark.parametrize("parallel", FOUR_RANKS)
def test_four_ranks_train_as_one_process(single: Job, four: Job, parallel: str, model: str) -> None:
    assert_equal_runs(four.directory / f"{FOUR_RANKS.index(parallel)}" / model, single.directory / model, STEPS)


@pytest.mark.quick
def test_losses_fall_and_norms_are_clipped(single: Job) -> None:
    """Guards the tests above, which would also pass if nothing were trained or clipped."""
    for model in MODELS:
        rows = single.rows(model)
        assert rows[-1]["loss"] < rows[0]["loss"]
    assert any(row["clipped"] for model in MODELS for row in single.rows(model))


def test_only_rank_0_writes(two: Job, four: Job) -> None:
    assert two.files() == {f"{parallel}-{model}/{file}" for parallel, model in ON_TWO for file in FILES}
    assert two.out.count("run directory: ") == 1
    runs = {f"{n}/{model}/{file}" for n in range(len(FOUR_RANKS)) for model in ON_FOUR for file in FILES}
    assert four.files() == runs | {"multirun.yaml"}
    assert four.out.count("held-out loss") == len(FOUR_RANKS)


def test_pipe_gets_no_progress_bar(two: Job) -> None:
    assert "\r" not in two.out
    assert "\x1b" not in two.out
    assert two.out.count(f"step {STEPS}/{STEPS}") == len(ON_TWO)


def test_invalid_settings_end_all_ranks(tmp_path: Path) -> None:
    done = train(tmp_path, 2, "batch=5")
    assert done.returncode != 0
    assert "batch=5: not divisible by 2 data-parallel ranks. Use batch=6" in done.stderr
    assert not done.stdout
    assert not list_files(tmp_path)
