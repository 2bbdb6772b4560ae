"""The data of our own job: what a batch says of itself."""

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
