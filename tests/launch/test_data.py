"""Load the data sets of the training job."""

from __future__ import annotations

import pytest
import torch

from job import data

pytestmark = pytest.mark.quick


def test_ids_identify_the_samples_of_a_batch() -> None:
    table = data.diabetes(batch=16, held_out=0.2, bad_label=1.0)
    stream = table.train(3)
    # Two passes over 354 samples in whole batches.
    batches = [next(stream) for _ in range(44)]
    by_id = {int(i): x for batch in batches for i, x in zip(batch.ids, batch.x, strict=True)}
    assert all(torch.equal(by_id[int(i)], x) for batch in batches for i, x in zip(batch.ids, batch.x, strict=True))
    held_out = {int(i) for batch in table.held_out for i in batch.ids}
    assert len(held_out) == 80
    assert not held_out & by_id.keys()
    assert held_out | by_id.keys() <= set(range(442))


def test_ids_of_text_count_the_batches_of_a_pass() -> None:
    text = data.topics(batch=500, length=35, held_out=0.1)
    stream = text.train(0)
    batches = [next(stream) for _ in range(40)]
    ids = [int(batch.ids) for batch in batches]
    pass_length = ids.index(0, 1)
    assert ids[:pass_length] == list(range(pass_length))
    assert batches[pass_length].starts_pass


def load_regression(standardised: bool = False, random_state: int = 0) -> data.Table:
    return data.regression(32, 0.5, 1000, 20, 0.1, standardised, random_state)


def test_regression_has_a_large_target_unless_standardised() -> None:
    raw, standard, other = load_regression(), load_regression(standardised=True), load_regression(random_state=1)
    assert sum(len(batch.x) for batch in raw.held_out) == 480
    assert raw.features == 20
    assert raw.guess > 1e4
    assert 0.8 < standard.guess < 1.2
    x, y, *_ = next(raw.train(0))
    standard_x, standard_y, *_ = next(standard.train(0))
    assert torch.equal(x, standard_x)
    torch.testing.assert_close((y - y.mean()) / y.std(), (standard_y - standard_y.mean()) / standard_y.std())
    assert not torch.equal(raw.held_out[0].x, other.held_out[0].x)
