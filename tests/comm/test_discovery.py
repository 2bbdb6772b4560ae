"""Find the ranks that take part in a call through a store, with threads as ranks and a HashStore."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from distclip import ArgumentError, DisagreementError
from distclip.comm.ranks import Axis, Ranks
from distclip.comm.rendezvous import Post, Rendezvous

SECONDS = timedelta(seconds=20)


def grid(pp: int, dp: int) -> Callable[[int], tuple[Ranks, Ranks]]:
    """Return a function from a rank to its pipeline group and its data-parallel group."""
    return lambda rank: (
        tuple(range(rank % dp, pp * dp, dp)),
        tuple(range(rank // dp * dp, rank // dp * dp + dp)),
    )


def agree_on_all_ranks(posts: dict[int, Post], timeout: timedelta = SECONDS) -> dict[int, object]:
    """Run one rendezvous on all ranks at once, and return the ranks or the error of each."""
    store = HashStore()

    def agree(item: tuple[int, Post]) -> object:
        try:
            return list(Rendezvous(store, item[0]).join(item[1], timeout).ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(posts)) as pool:
        return dict(zip(posts, pool.map(agree, posts.items()), strict=True))


def stage_post(rank: int, *, empty: bool = False, **more: object) -> Post:
    """Return the post of a rank of 2 stages x 2, with FSDP within a stage unless the rank is empty."""
    pp, dp = grid(2, 2)(rank)
    groups = (pp,) if empty else (pp, dp)
    return Post(groups, (Axis(pp, "pp", f"pp{min(pp)}"),), **more)  # type: ignore[arg-type]


def test_finds_neighbors_of_neighbors() -> None:
    assert agree_on_all_ranks({rank: stage_post(rank) for rank in range(4)}) == dict.fromkeys(range(4), [0, 1, 2, 3])


def test_finds_64_ranks_of_which_each_knows_18() -> None:
    groups_of = grid(4, 16)
    posts = {r: Post(groups_of(r), (Axis(groups_of(r)[0], "pp", f"pp{r % 16}"),)) for r in range(64)}
    results = agree_on_all_ranks(posts)
    assert results == dict.fromkeys(range(64), list(range(64)))


@pytest.mark.parametrize("empty", [{3}, {0}, {2, 3}, {0, 3}])
def test_ranks_that_hold_nothing_take_part(empty: set[int]) -> None:
    results = agree_on_all_ranks({rank: stage_post(rank, empty=rank in empty) for rank in range(4)})
    assert results == dict.fromkeys(range(4), [0, 1, 2, 3])


def test_models_on_other_ranks_do_not_take_part() -> None:
    posts = {0: Post(((0, 1),), ()), 1: Post(((0, 1),), ()), 2: Post(((2, 3),), ()), 3: Post(((2, 3),), ())}
    assert agree_on_all_ranks(posts) == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}


def test_repeats_on_the_same_store() -> None:
    store = HashStore()

    def agree(rank: int) -> list[list[int]]:
        rendezvous = Rendezvous(store, rank)
        return [list(rendezvous.join(stage_post(rank), SECONDS).ranks) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(agree, range(4))) == [[[0, 1, 2, 3]] * 50] * 4


def test_error_of_one_rank_is_raised_by_all() -> None:
    failed = ("ArgumentError", "max_norm=-1.0: negative")
    results = agree_on_all_ranks({rank: stage_post(rank, error=failed if rank == 3 else None) for rank in range(4)})
    assert {type(error) for error in results.values()} == {ArgumentError}
    assert {str(error) for error in results.values()} == {"rank 3: max_norm=-1.0: negative"}


@pytest.mark.parametrize("other", ["another axis", "nothing"])
def test_disagreement_is_raised_by_all(other: str) -> None:
    posts = {rank: stage_post(rank) for rank in range(4)}
    dp = grid(2, 2)(3)[1]
    posts[3] = Post((dp,), (Axis(dp, "dp", "dp1"),) if other == "another axis" else ())
    results = agree_on_all_ranks(posts)
    assert {type(error) for error in results.values()} == {DisagreementError}
    assert all("split_over=" in str(error) and "rank 3 passed" in str(error) for error in results.values())


def test_names_a_rank_that_never_calls() -> None:
    error = agree_on_all_ranks({0: Post(((0, 1),), (Axis((0, 1), "pp", "x"),))}, timedelta(milliseconds=50))[0]
    assert isinstance(error, DisagreementError)
    assert str(error).startswith("1 of 2 ranks (rank 1) have not made this call")
