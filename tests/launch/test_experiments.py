"""Run the experiments of conf/experiment for a few steps, and repeat a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.launch.jobs import FILES, ROOT, Job, list_files, succeed, train

EXPERIMENTS = ["rescue", "bad_label", "regression", "lstm", "gpt", "direction"]


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two steps of each experiment in one job, with --multirun between the overrides."""
    cwd = tmp_path_factory.mktemp("experiments")
    names = f"experiment={','.join(EXPERIMENTS)}"
    short = ["steps=2", "batch=8", "data.held_out=0.02", "hydra.sweep.dir=run"]
    return Job(cwd / "run", succeed(train(cwd, 1, "parallel=single", names, "--multirun", *short)))


def test_rescue_compares_three_runs(experiments: Job) -> None:
    row = next(line for line in experiments.out.splitlines() if "held-out loss" in line)
    clipped, unclipped, control = (float(cell) for cell in row.strip(" │").split("│")[1:])
    # Nothing is clipped in the first two steps.
    assert clipped == unclipped != control


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_prints_a_table_and_the_note(experiments: Job, name: str) -> None:
    cfg = OmegaConf.load(ROOT / "conf/experiment" / f"{name}.yaml")
    directory = experiments.directory / str(EXPERIMENTS.index(name))
    assert {path.name for path in directory.iterdir()} == {run.replace(" ", "_") for run in cfg.compare}
    assert cfg.note in experiments.out


def test_direction_records_angles(experiments: Job) -> None:
    number = EXPERIMENTS.index("direction")
    assert [row["angle"] for row in experiments.rows(f"{number}/unclipped")] == [0, 0]
    angles = [row["angle"] for row in experiments.rows(f"{number}/value_0.01")]
    assert min(angles) > 1
    assert experiments.summary(f"{number}/value_0.01")["angle_max"] == max(angles)


def test_cliff_draws_a_figure(tmp_path: Path) -> None:
    out = succeed(train(tmp_path, 2, "experiment=cliff", "steps=3", "hydra.run.dir=run"))
    files = (*FILES, "figures/cliff.json")
    assert list_files(tmp_path / "run") == {f"{run}/{file}" for run in ("norm_1", "unclipped") for file in files}
    assert "solved" in out
    assert "at chance level" not in out


def test_replay_distinguishes_a_fault_from_bad_data(tmp_path: Path) -> None:
    # The gradient is corrupted at step 33. The bad label occurs in its second pass at step 39.
    bad_label = ["data=diabetes", "data.bad_label=1000", "batch=16", "optim.lr=0.01"]
    settings = ["parallel=single", "checkpoint.every=3", "steps=40", "probe.step=33", "hydra.run.dir=run"]
    assert "steps to recover" in succeed(train(tmp_path, 1, "experiment=one_spike", *bad_label, *settings))
    again = ["parallel=single", "resume=run/norm_1", "replay=33,39", "--multirun"]
    lines = succeed(train(tmp_path, 1, *again)).splitlines()
    fault, data = (line for line in lines if " then, " in line)
    assert fault.startswith("step 33: norm ")
    assert "The norm differs: the cause was a transient fault" in fault
    assert "after the forward pass, not the batch (samples " in fault
    assert data.startswith("step 39: norm ")
    assert "The norm is the same: the cause is the batch (samples " in data
    assert "The largest part of the gradient is that of sample " in data
    words = data.replace(",", "").replace(";", "").split()
    old, new = words[words.index("norm") + 1], words[words.index("norm") + 3]
    # The bits are the same.
    assert old == new
    assert float(old) > 100
