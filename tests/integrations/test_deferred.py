"""Sample ids of a batch, as `distclip.integrations.deferred` finds them."""

from __future__ import annotations

import torch


def test_ids_of_a_batch() -> None:
    from distclip.integrations.deferred import find_ids

    ids = torch.tensor([3, 1])
    assert find_ids({"x": torch.zeros(2), "idx": ids}) is ids
    assert find_ids({"id": ["a", "b"], "input_ids": torch.zeros(2, 3)}) == ["a", "b"]
    for batch in ({"ids": torch.zeros(2, 3)}, {"id": 7}, [1, 2], None):
        assert find_ids(batch) is None
