"""Run policies on layouts, over several steps, against whole tensors in float64.

A policy sees norms of slots and not the layout. So one policy of each granularity runs on every layout, and every
policy runs on three layouts.
"""

from __future__ import annotations

import pytest

from tests.policies.checks import FITTED, PER_GRANULARITY, check_policies
from tests.ranks import on_ranks
from tests.tables.layouts import LAYOUTS

MARKED = ("tied_", "annotated_", "megatron_", "spmd_")
"""Prefixes of layouts with shards by annotation or tag, which tests/sharding/test_slots.py covers."""

DIFFERENT_ON_FOUR = {
    "ddp_unused",
    "fsdp2_ragged",
    "fsdp2_empty",
    "fsdp1_full_shard_orig",
    "partial_missing_on_one",
    "stages",
}
"""Layouts that are different on two ranks and on four. For the others two are enough."""

CASES = [
    (name, 2 if 2 in row.worlds and name not in DIFFERENT_ON_FOUR else 4)
    for name, row in LAYOUTS.items()
    if not name.startswith(MARKED) and 8 not in row.worlds
]


@pytest.mark.parametrize(("name", "num_ranks"), CASES)
@on_ranks()
def test_each_granularity_on_every_layout(name: str) -> None:
    check_policies(name, PER_GRANULARITY)


@on_ranks(4)
@pytest.mark.parametrize("policy", FITTED)
@pytest.mark.parametrize("name", ["fsdp2_ragged", "fsdp2_tp", "stages_fsdp2"])
def test_every_policy_on_three_layouts(name: str, policy: str) -> None:
    check_policies(name, [policy])
