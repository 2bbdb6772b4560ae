"""Weighted checksums: 0 for equal replicas, exact in float64, another number for any replica that differs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distclip.comm import threads
from distclip.norms.replica_sums import add_sums, sum_by_group, weighted_sum
from distclip.sharding.replicas import ReplicaGroup, replica_weight
from distclip.sharding.shard import ShardInfo, ShardInfos

SIZES = [*range(2, 18), 63, 64, 101, 1023, 1024, 1447, 1448, 1900, 2001, 4096, 10_001, 100_000]


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("num_replicas", [2, 3, 8, None])
def test_weights_add_up_to_zero_and_keep_sums_exact(world_size: int, num_replicas: int | None) -> None:
    size = num_replicas or world_size
    if size > world_size:
        pytest.skip("no such group")
    weights = [replica_weight(i, size, world_size) for i in range(size)]
    assert sum(weights) == 0
    assert all(weights)
    assert len(set(weights)) == size or world_size > 1024
    # The largest sum of any summands is that of all positive ones, in all groups of the world.
    assert sum(weight for weight in weights if weight > 0) * (world_size // size) * (2**32 - 1) < 2**51


@settings(max_examples=50)
@given(
    checksums=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=12),
    seed=st.integers(0, 1000),
)
def test_sum_is_zero_only_for_equal_replicas(checksums: list[int], seed: int) -> None:
    """Add the summands in any order, as an all-reduce does, in float64."""
    size = len(checksums)
    group, order = ReplicaGroup(tuple(range(size))), torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    comms = threads(size)

    def total(values: list[int]) -> float:
        summands = [float(weighted_sum({group: torch.tensor(v)}, comm)) for v, comm in zip(values, comms, strict=True)]
        return sum(summands[i] for i in order)

    assert total([checksums[0]] * size) == 0
    for rank in range(size):
        changed = [checksums[0]] * size
        changed[rank] = checksums[0] ^ 1 << seed % 32
        assert total(changed) != 0
    if len(set(checksums)) > 1 and size == 2:
        assert total(checksums) != 0


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_two_checksums_never_cancel_whichever_ranks_have_them(size: int) -> None:
    group, comms = ReplicaGroup(tuple(range(size))), threads(size)
    for pattern in itertools.product((0, 1), repeat=size):
        summands = [int(weighted_sum({group: 100 + 7 * v}, c)) for v, c in zip(pattern, comms, strict=True)]
        assert (sum(summands) == 0) == (len(set(pattern)) == 1)


def test_equal_differences_in_two_groups_do_not_cancel() -> None:
    """Ranks 0 and 3 have one gradient, and ranks 1 and 2 another."""
    groups = {rank: ReplicaGroup(ranks) for ranks in ((0, 2), (1, 3)) for rank in ranks}
    values = (1000, 2000, 2000, 1000)
    for kind in (int, torch.tensor):
        summands = [int(weighted_sum({groups[c.rank]: kind(values[c.rank])}, c)) for c in threads(4)]
        assert sum(summands) != 0


def test_two_equal_and_opposite_changes_do_not_cancel() -> None:
    group, comms = ReplicaGroup(tuple(range(8))), threads(8)
    for one, two in itertools.permutations(range(8), 2):
        values = [1000 + 16 * (rank == one) - 16 * (rank == two) for rank in range(8)]
        assert sum(int(weighted_sum({group: torch.tensor(v)}, c)) for v, c in zip(values, comms, strict=True)) != 0


def test_tensors_count_in_every_group_that_holds_them() -> None:
    one, two = ReplicaGroup((0, 1)), ReplicaGroup((0, 2), is_exact=False)
    infos = ShardInfos([ShardInfo("a", replicas=(one,)), ShardInfo("b", replicas=(one, two)), ShardInfo("c")])
    checksums, powers = torch.tensor([1, 20, 300]), torch.tensor([1.0, 8.0, 2.0], dtype=torch.float64)
    assert {group: int(value) for group, value in sum_by_group(checksums, infos).items()} == {one: 21, two: 20}
    rounded = sum_by_group(checksums, infos, powers, rounded={(0, 1), (0, 2)})
    # A group whose replicas must have the same bits is never rounded.
    assert {group: int(value) for group, value in rounded.items()} == {one: 21, two: 3 << 17}
    assert sum_by_group(checksums, infos, None, rounded={(0, 2)}).keys() == {one}
    more = add_sums(rounded, {one: torch.tensor(4)})
    assert int(more[one]) == 25


@pytest.mark.parametrize("power", [0.0, float("inf"), float("nan")])
def test_rounded_logarithm_of_any_power_sum_is_an_integer(power: float) -> None:
    group = ReplicaGroup((0, 1), is_exact=False)
    infos = ShardInfos([ShardInfo("a", replicas=(group,))])
    powers = torch.tensor([power], dtype=torch.float64)
    assert int(sum_by_group(torch.tensor([5]), infos, powers, rounded={(0, 1)})[group]) == 0
