"""Test the harness itself: `@on_ranks`, the values in a failing assert, and the world that follows a failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, World, gather_from_ranks, on_ranks
from tests.tables.layouts.meshes import group_of


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    """Start a world of two ranks that other modules do not see, because these tests break it."""
    world = World(2)
    yield world
    world.stop()


@on_ranks(2, 4)
def test_runs_on_every_rank_of_each_size(num_ranks: int) -> None:
    assert gather_from_ranks(dist.get_rank()) == list(range(num_ranks))


@on_ranks(2)
@pytest.mark.parametrize("above", ["below"])
def test_parametrizes_below(above: str) -> None:
    assert (above, dist.get_world_size()) == ("below", 2)


@pytest.mark.parametrize(("word", "num_ranks"), [("two", 2), ("four", 4)])
@on_ranks()
def test_takes_the_size_from_a_row_of_a_table(word: str) -> None:
    assert {"two": 2, "four": 4}[word] == dist.get_world_size()


@on_ranks(2)
def test_passes_fixtures_on(tmp_path: Path) -> None:
    assert gather_from_ranks(tmp_path) == [tmp_path, tmp_path]


def compare_lists() -> None:
    """Fail with two lists on rank 1 and pass on rank 0."""
    numbers, others = [1, 2, 3], [1, 2, 3 + dist.get_rank()]
    assert numbers == others


def end_process() -> None:
    """End the process of rank 0 while rank 1 waits for it."""
    if dist.get_rank() == 0:
        raise SystemExit(3)
    dist.barrier()


def sum_ranks_on_a_mesh() -> float:
    """Sum the ranks over a process group that is created once per world."""
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=group_of(0, 1))
    return float(total)


def test_a_failing_assert_shows_its_values(pair: World) -> None:
    with pytest.raises(RankError) as caught:
        pair.run(compare_lists)
    report = str(caught.value)
    assert "--- rank 1" in report
    assert "--- rank 0" not in report
    assert "assert [1, 2, 3] == [1, 2, 4]" in report
    assert "At index 2 diff: 3 != 4" in report
    assert "in compare_lists" in report


def test_a_new_world_with_new_groups_follows_a_failure(pair: World) -> None:
    assert pair.run(sum_ranks_on_a_mesh) == [1.0, 1.0]
    with pytest.raises(RankError, match=r"--- rank 0[\s\S]*SystemExit[\s\S]*without an answer: \[1\]"):
        pair.run(end_process)
    assert pair.run(sum_ranks_on_a_mesh) == [1.0, 1.0]
