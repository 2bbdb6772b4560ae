"""The data of our own job: what they are, and what a batch says of itself."""

from __future__ import annotations

import torch

import data


def test_a_batch_says_which_samples_it_holds() -> None:
    table = data.diabetes(batch=16, held_out=0.2, bad_label=1.0)
    stream = table.train(3)
    batches = [next(stream) for _ in range(44)]  # two passes of 354 samples in whole batches
    seen = {int(i): x for batch in batches for i, x in zip(batch.ids, batch.x, strict=True)}
    assert all(torch.equal(seen[int(i)], x) for batch in batches for i, x in zip(batch.ids, batch.x, strict=True))
    held_out = {int(i) for batch in table.held_out for i in batch.ids}
    assert len(held_out) == 80 and not held_out & seen.keys()
    assert held_out | seen.keys() <= set(range(442))


def test_a_batch_of_text_says_its_place_in_the_pass() -> None:
    text = data.topics(batch=500, length=35, held_out=0.1)
    stream = text.train(0)
    first = [next(stream) for _ in range(40)]
    ids = [int(batch.ids) for batch in first]
    passed = ids.index(0, 1)
    assert ids[:passed] == list(range(passed)) and first[passed].first


def made(standardised: bool = False, random_state: int = 0) -> data.Table:
    return data.regression(32, 0.5, 1000, 20, 0.1, standardised, random_state)


def test_a_regression_has_a_large_target_unless_standardised() -> None:
    raw, standard, other = made(), made(standardised=True), made(random_state=1)
    assert sum(len(batch.x) for batch in raw.held_out) == 480 and raw.features == 20
    assert raw.guess > 1e4 and 0.8 < standard.guess < 1.2
    x, y, *_ = next(raw.train(0))
    again, scaled, *_ = next(standard.train(0))
    assert torch.equal(x, again)
    torch.testing.assert_close((y - y.mean()) / y.std(), (scaled - scaled.mean()) / scaled.std())
    assert not torch.equal(raw.held_out[0].x, other.held_out[0].x)
