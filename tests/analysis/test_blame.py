"""Samples, ranks and tensors that spikes have in common: a known sample, or none."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.blame import blame
from distclip.monitor.analysis.log import read
from tests.logs import (
    HEADER,
    make_bad_data_lines,
    make_launched,
    make_line,
    make_lines,
    make_log,
    write_and_read,
    write_run,
)


def make_spikes(batches: list[list[Any]], every: int = 10, **fields: Any) -> list[Any]:
    """Return a run with periodic spikes on these batches."""
    ids_at = {(1 + i) * every: ids for i, ids in enumerate(batches)}
    return [
        make_line(step, 30.0, spike=30.0, ids=ids_at[step], **fields) if step in ids_at else make_line(step, 1.0)
        for step in range(1, every * (len(batches) + 1))
    ]


def random_batches(count: int, samples: int = 360, batch: int = 16, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.choice(samples, batch, replace=False).tolist() for _ in range(count)]


def test_finds_corrupted_sample(tmp_path: Path) -> None:
    result = blame(read(make_launched(write_run(tmp_path / "run", HEADER, make_bad_data_lines()))))
    (suspect,) = result.suspects
    # 60 epochs of 22 batches of 16 of the 360 samples.
    assert suspect.id == 137
    assert suspect.count == len(result.spikes) == result.num_with_ids == 57
    assert suspect.expected == pytest.approx(57 * 16 / 360, rel=0.1)
    assert suspect.chance < 1e-50
    assert result.worst is not None
    assert result.worst.ratio == max(spike.ratio for spike in result.spikes)
    assert result.replay == f"python launch/train.py resume={tmp_path / 'run'} replay={result.worst.step}"
    assert dict(result.ranks).keys() == {0, 1}
    assert sum(dict(result.ranks).values()) == 57
    assert result.tensors == (("2.weight", 57),)
    assert "57 spikes with sample ids: sample 137 is in 57 of them, where 2.7 are expected by chance" in result.text


@pytest.mark.parametrize("bad", [0, "doc-17"])
@pytest.mark.parametrize(
    ("num_spikes", "dataset_size", "is_suspect"),
    [(2, 360, False), (4, 360, True), (3, None, False), (8, None, True)],
)
def test_minimum_number_of_spikes(
    num_spikes: int, dataset_size: int | None, is_suspect: bool, bad: int | str, tmp_path: Path
) -> None:
    """Without the size of the dataset, a suspect needs more spikes."""
    batches: list[list[Any]] = [[bad, *ids[1:]] for ids in random_batches(num_spikes)]
    header = HEADER if dataset_size is None else {**HEADER, "dataset_size": dataset_size}
    result = blame(write_and_read(tmp_path, header, make_spikes(batches)))
    assert bool(result.suspects) == is_suspect
    assert result.most_frequent is not None
    assert (result.most_frequent.id, result.most_frequent.count) == (bad, num_spikes)


def test_no_suspect_among_random_batches(tmp_path: Path) -> None:
    for seed, count in product(range(10), (2, 8, 40)):
        result = blame(write_and_read(tmp_path, HEADER, make_spikes(random_batches(count, seed=seed))))
        assert result.suspects == ()
        assert "no sample is in more of them than chance explains" in result.text
    assert result.replay is None
    assert "load a checkpoint from before step" in result.how_to_replay
    assert result.num_with_ids == 40


def test_samples_that_always_occur_together(tmp_path: Path) -> None:
    batches = [[1, 2, 3, *ids] for ids in random_batches(8)]
    result = blame(write_and_read(tmp_path, {**HEADER, "dataset_size": 5000}, make_spikes(batches)))
    assert [suspect.id for suspect in result.suspects] == [1, 2, 3]
    assert "samples 1, 2, 3 are each in 8 of them" in result.text
    assert "cannot tell" in result.text


def test_no_suspect_if_every_batch_is_the_dataset(tmp_path: Path) -> None:
    assert blame(write_and_read(tmp_path, HEADER, make_spikes([list(range(16))] * 8))).suspects == ()


def test_spikes_without_ids(tmp_path: Path) -> None:
    result = blame(write_and_read(tmp_path, HEADER, make_spikes([[]] * 3)))
    assert (result.num_with_ids, result.suspects, result.most_frequent) == (0, (), None)
    assert result.text.startswith("3 spikes, but no sample ids")
    assert "recorder.note(ids=...)" in result.text
    assert result.replay is None
    assert "load a checkpoint from before step" in result.how_to_replay


def test_log_without_recorded_spikes(tmp_path: Path) -> None:
    result = blame(write_and_read(tmp_path, HEADER, make_lines([1.0] * 100)))
    assert result.text.startswith("No spikes")
    assert result.worst is None
    assert result.replay is None
    norms = np.ones(200)
    norms[[50, 60]] = [40, math.nan]
    assert "2 of 200 steps stand out, but the log has no details" in blame(make_log(norms)).text


def test_definition_of_a_spike(tmp_path: Path) -> None:
    """A spike has three times the median or is not finite. Of consecutive non-finite steps only the first counts."""
    lines = make_lines([1.0] * 20)
    lines[4].update(spike=2.9, ids=[1])
    lines[6].update(spike=3.0, ids=[2])
    lines[8].update(spike=None, ids=[3])
    for step in range(12, 20):
        lines[step].update(norm=math.nan, finite=False, spike=None, ids=[step])
    result = blame(write_and_read(tmp_path, HEADER, lines))
    assert [spike.step for spike in result.spikes] == [7, 13]
    assert result.worst is not None
    assert result.worst.step == 13
