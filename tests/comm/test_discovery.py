"""Who takes part, found out through a store: threads as ranks, a HashStore between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from distclip import ArgumentError, DisagreementError
from distclip.comm.discovery import Post, Rendezvous
from distclip.comm.ranks import Axis, Ranks

SECONDS = timedelta(seconds=20)


def grid(pp: int, dp: int) -> Callable[[int], tuple[Ranks, Ranks]]:
    """(pipeline group, data-parallel group) of a rank."""
    return lambda rank: (
        tuple(range(rank % dp, pp * dp, dp)),
        tuple(range(rank // dp * dp, rank // dp * dp + dp)),
    )


def together(posts: dict[int, Post], timeout: timedelta = SECONDS) -> dict[int, object]:
    """One agreement on every rank at once; what each returned or raised."""
    store = HashStore()

    def one(item: tuple[int, Post]) -> object:
        try:
            return list(Rendezvous(store, item[0]).join(item[1], timeout).ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(posts)) as pool:
        return dict(zip(posts, pool.map(one, posts.items()), strict=True))


def stage_post(rank: int, *, empty: bool = False, **more: object) -> Post:
    """A rank of 2 stages x 2: FSDP within a stage, unless it holds nothing."""
    pp, dp = grid(2, 2)(rank)
    groups = (pp,) if empty else (pp, dp)
    return Post(groups, (Axis(pp, "pp", f"pp{min(pp)}"),), **more)  # type: ignore[arg-type]


def test_neighbours_of_neighbours_are_found() -> None:
    assert together({rank: stage_post(rank) for rank in range(4)}) == dict.fromkeys(range(4), [0, 1, 2, 3])


def test_a_wide_grid() -> None:
    """64 ranks, each of which knows 18 others."""
    place = grid(4, 16)
    posts = {r: Post(place(r), (Axis(place(r)[0], "pp", f"pp{r % 16}"),)) for r in range(64)}
    found = together(posts)
    assert found == dict.fromkeys(range(64), list(range(64)))


@pytest.mark.parametrize("empty", [{3}, {0}, {2, 3}, {0, 3}])
def test_ranks_that_hold_nothing_take_part(empty: set[int]) -> None:
    found = together({rank: stage_post(rank, empty=rank in empty) for rank in range(4)})
    assert found == dict.fromkeys(range(4), [0, 1, 2, 3])


def test_another_model_is_not_asked() -> None:
    posts = {0: Post(((0, 1),), ()), 1: Post(((0, 1),), ()), 2: Post(((2, 3),), ()), 3: Post(((2, 3),), ())}
    assert together(posts) == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}


def test_agreeing_again_on_the_same_store() -> None:
    store = HashStore()

    def one(rank: int) -> list[list[int]]:
        rendezvous = Rendezvous(store, rank)
        return [list(rendezvous.join(stage_post(rank), SECONDS).ranks) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [[[0, 1, 2, 3]] * 50] * 4


def test_one_rank_failing_is_read_by_all() -> None:
    failed = ("ArgumentError", "max_norm=-1.0: negative")
    found = together({rank: stage_post(rank, error=failed if rank == 3 else None) for rank in range(4)})
    assert {type(error) for error in found.values()} == {ArgumentError}
    assert {str(error) for error in found.values()} == {"rank 3: max_norm=-1.0: negative"}


@pytest.mark.parametrize("other", ["another axis", "nothing"])
def test_disagreement_is_raised_by_all(other: str) -> None:
    posts = {rank: stage_post(rank) for rank in range(4)}
    dp = grid(2, 2)(3)[1]
    posts[3] = Post((dp,), (Axis(dp, "dp", "dp1"),) if other == "another axis" else ())
    found = together(posts)
    assert {type(error) for error in found.values()} == {DisagreementError}
    assert all("split_over=" in str(error) and "rank 3 passed" in str(error) for error in found.values())


def test_a_rank_that_never_comes_is_named() -> None:
    error = together({0: Post(((0, 1),), (Axis((0, 1), "pp", "x"),))}, timedelta(milliseconds=50))[0]
    assert isinstance(error, DisagreementError)
    assert str(error).startswith("rank(s) [1] share a mesh or an axis of split_over= with rank 0 passed [pp over ranks")
