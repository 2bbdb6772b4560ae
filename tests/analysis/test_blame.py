"""Whom spikes have in common: a sample that is known, or nobody."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.blame import blame
from tests.analysis.by_hand import HEADER, bad_record, log_of, recorded, row, rows


def spikes(batches: list[list[Any]], every: int = 10, **more: Any) -> list[Any]:
    """A run with a spike every so many steps, on these batches."""
    steps = {(1 + i) * every: ids for i, ids in enumerate(batches)}
    return [
        row(step, 30.0, spike=30.0, ids=steps[step], **more) if step in steps else row(step, 1.0)
        for step in range(1, every * (len(batches) + 1))
    ]


def random_batches(count: int, samples: int = 360, batch: int = 16, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.choice(samples, batch, replace=False).tolist() for _ in range(count)]


def test_a_corrupted_record(tmp_path: Path) -> None:
    found = blame(recorded(tmp_path / "run", HEADER, bad_record()))
    (suspect,) = found.suspects
    # 60 epochs of 22 batches of 16 of the 360 samples.
    assert suspect.id == 137 and suspect.count == len(found.spikes) == found.with_ids == 57
    assert suspect.expected == pytest.approx(57 * 16 / 360, rel=0.1) and suspect.chance < 1e-50
    assert found.worst is not None and found.worst.ratio == max(each.ratio for each in found.spikes)
    assert found.replay == f"launch/train.py resume={tmp_path / 'run'} replay={found.worst.step}"
    assert dict(found.ranks).keys() == {0, 1} and sum(dict(found.ranks).values()) == 57
    assert found.tensors == (("2.weight", 57),)
    assert "57 spikes with sample ids: sample 137 is in 57 of them, where chance has 2.7" in found.text


@pytest.mark.parametrize("bad", [0, "doc-17"])
def test_how_few_spikes_will_do(bad: int | str, tmp_path: Path) -> None:
    """Three where the header says how many samples there are, some more where it does not."""
    for (count, told), expected in {(2, 360): False, (4, 360): True, (3, None): False, (8, None): True}.items():
        batches: list[list[Any]] = [[bad, *ids[1:]] for ids in random_batches(count)]
        header = HEADER if told is None else {**HEADER, "dataset_size": told}
        found = blame(recorded(tmp_path, header, spikes(batches)))
        assert bool(found.suspects) == expected, (count, told)
        assert found.most is not None and (found.most.id, found.most.count) == (bad, count)


def test_nothing_in_common(tmp_path: Path) -> None:
    for seed, count in product(range(10), (2, 8, 40)):
        found = blame(recorded(tmp_path, HEADER, spikes(random_batches(count, seed=seed))))
        assert found.suspects == () and "no sample is in more of them than chance would have it" in found.text
    assert found.replay is not None and found.with_ids == 40


def test_samples_that_always_come_together(tmp_path: Path) -> None:
    batches = [[1, 2, 3, *ids] for ids in random_batches(8)]
    found = blame(recorded(tmp_path, {**HEADER, "dataset_size": 5000}, spikes(batches)))
    assert [each.id for each in found.suspects] == [1, 2, 3]
    assert "samples 1, 2, 3 are each in 8 of them" in found.text and "cannot tell" in found.text


def test_the_whole_data_in_every_batch(tmp_path: Path) -> None:
    assert blame(recorded(tmp_path, HEADER, spikes([list(range(16))] * 8))).suspects == ()


def test_no_ids(tmp_path: Path) -> None:
    found = blame(recorded(tmp_path, HEADER, spikes([[]] * 3)))
    assert (found.with_ids, found.suspects, found.most) == (0, (), None)
    assert found.text.startswith("3 spikes, and no sample ids") and "recorder.note(ids=...)" in found.text
    assert found.replay is not None


def test_a_log_without_spikes_in_it(tmp_path: Path) -> None:
    found = blame(recorded(tmp_path, HEADER, rows([1.0] * 100)))
    assert "nobody to blame" in found.text and found.worst is None and found.replay is None
    by_hand = np.ones(200)
    by_hand[[50, 60]] = [40, math.nan]
    assert "2 of 200 steps stand out, and the log says nothing more" in blame(log_of(by_hand)).text


def test_what_is_a_spike(tmp_path: Path) -> None:
    """Three times the median or not finite; of steps in a row that are not finite, the first."""
    lines = rows([1.0] * 20)
    lines[4].update(spike=2.9, ids=[1])
    lines[6].update(spike=3.0, ids=[2])
    lines[8].update(spike=None, ids=[3])
    for step in range(12, 20):
        lines[step].update(norm=math.nan, finite=False, spike=None, ids=[step])
    found = blame(recorded(tmp_path, HEADER, lines))
    assert [each.step for each in found.spikes] == [7, 13]
    assert found.worst is not None and found.worst.step == 13
