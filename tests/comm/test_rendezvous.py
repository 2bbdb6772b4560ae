"""Find the ranks that take part in a call through a store: simulated ranks in virtual time, and threads."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from distclip import ArgumentError, DisagreementError
from distclip.bench.simulated import RankCosts, SimulatedStore, run_ranks
from distclip.comm.ranks import Axis, Grid, Ranks, ascending, decode_ranks, encode_ranks
from distclip.comm.rendezvous import Post, Rendezvous, derive_component
from distclip.errors import DistclipError

MINUTES = timedelta(minutes=30)


def grid(pp: int, dp: int) -> Callable[[int], tuple[Ranks, Ranks]]:
    """Return a function from a rank to its pipeline group and its data-parallel group."""
    return lambda rank: (
        tuple(range(rank % dp, pp * dp, dp)),
        tuple(range(rank // dp * dp, rank // dp * dp + dp)),
    )


def make_post(rank: int, size: int, groups: Sequence[Ranks], axes: Sequence[Axis] = (), **more: object) -> Post:
    """Return the post of a rank that has these groups and axes."""
    spans = {ascending(ranks) for ranks in (*groups, *(axis.ranks for axis in axes))}
    known = derive_component(groups, axes, rank, size)
    return Post(tuple(sorted(spans)), tuple(axes), known=known, **more)  # type: ignore[arg-type]


def stage_post(rank: int, *, empty: bool = False, **more: object) -> Post:
    """Return the post of a rank of 2 stages x 2, with FSDP within a stage unless the rank is empty."""
    pp, dp = grid(2, 2)(rank)
    return make_post(rank, 4, [] if empty else [dp], [Axis(pp, "pp", f"pp{min(pp)}")], **more)


def agree(posts: dict[int, Post], timeout: timedelta = MINUTES, seed: int | None = 0) -> dict[int, object]:
    """Run one rendezvous on all ranks that have a post, and return the ranks or the error of each."""

    def join(store: SimulatedStore) -> object:
        if store.rank not in posts:
            return None
        try:
            return list(Rendezvous(store, store.rank, store).join(posts[store.rank], timeout).ranks)
        except DistclipError as error:
            return error

    results, _ = run_ranks(join, max(posts) + 1, seed)
    return {rank: results[rank] for rank in posts}


def test_finds_neighbors_of_neighbors() -> None:
    assert agree({rank: stage_post(rank) for rank in range(4)}) == dict.fromkeys(range(4), [0, 1, 2, 3])


@pytest.mark.parametrize("empty", [{3}, {0}, {2, 3}, {0, 3}])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_hold_nothing_take_part(empty: set[int], seed: int) -> None:
    results = agree({rank: stage_post(rank, empty=rank in empty) for rank in range(4)}, seed=seed)
    assert results == dict.fromkeys(range(4), [0, 1, 2, 3])


def test_models_on_other_ranks_do_not_take_part() -> None:
    posts = {rank: make_post(rank, 4, [(0, 1) if rank < 2 else (2, 3)]) for rank in range(4)}
    assert agree(posts) == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}


def test_repeats_on_the_same_store() -> None:
    store = HashStore()

    def join(rank: int) -> list[list[int]]:
        rendezvous = Rendezvous(store, rank)
        return [
            list(rendezvous.join(stage_post(rank, empty=rank == 3 and i % 4 == 1), MINUTES).ranks) for i in range(9)
        ]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(join, range(4))) == [[[0, 1, 2, 3]] * 9] * 4


@pytest.mark.parametrize("knows", [True, False])
def test_error_of_one_rank_is_raised_by_all(knows: bool) -> None:
    failed = ("ArgumentError", "max_norm=-1.0: negative")
    results = agree({r: stage_post(r, empty=r == 2 and not knows, error=failed if r == 3 else None) for r in range(4)})
    assert {type(error) for error in results.values()} == {ArgumentError}
    assert {str(error) for error in results.values()} == {"rank 3: max_norm=-1.0: negative"}


@pytest.mark.parametrize("other", ["another axis", "nothing", "another line"])
@pytest.mark.parametrize("seed", range(3))
def test_disagreement_is_raised_by_all(other: str, seed: int) -> None:
    posts = {rank: stage_post(rank) for rank in range(4)}
    dp = grid(2, 2)(3)[1]
    axes = {
        "another axis": [Axis(dp, "dp", "dp1")],
        "nothing": [],
        "another line": [Axis((1, 3), "pp", "of another program")],
    }[other]
    posts[3] = make_post(3, 4, [dp], axes)
    results = agree(posts, seed=seed)
    if other == "another line":
        # Two process groups of the same ranks are the same axis.
        assert results == dict.fromkeys(range(4), [0, 1, 2, 3])
        return
    assert {type(error) for error in results.values()} == {DisagreementError}
    assert all("split_over=" in str(error) and "rank 3 passed" in str(error) for error in results.values())


@pytest.mark.parametrize("stage", ["count", "search"])
def test_one_rank_logs_who_is_missing_and_all_raise(
    stage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCLIP_PATIENCE", "2")
    groups = [(0, 1, 2, 3, 4)] if stage == "count" else [(0, 1, 2), (1, 2, 3, 4)]
    posts = {rank: make_post(rank, 5, [one for one in groups if rank in one]) for rank in (0, 1, 2, 4)}
    with caplog.at_level(logging.WARNING, "distclip"):
        results = agree(posts, timedelta(seconds=5))
    # A rank of a round that is being simulated runs several times, and logs the same each time.
    assert len({record.getMessage() for record in caplog.records}) == 1
    assert "1 of 5 ranks (rank 3)" in caplog.records[0].getMessage()
    assert {type(error) for error in results.values()} == {DisagreementError}
    assert all("1 of 5 ranks (rank 3) have not made this call" in str(error) for error in results.values())


# ---- Sequences of calls ----


def random_call(rng: random.Random, size: int) -> dict[int, tuple[Post, list[int] | None]]:
    """Return the posts of a random first call, and the component or None for an error, by rank."""
    everyone = tuple(range(size))
    kinds = ["whole", "some", "stages", "stages of groups", "path", "two models", "experts", "error", "number"]
    kind = rng.choice(kinds if size % 2 == 0 else kinds[:2] + kinds[4:])
    num_groups = rng.randrange(3)
    if kind.startswith("stages"):
        dp = size // 2
        root = Grid((2, dp), everyone) if kind == "stages" else None
        empty = {rng.randrange(size)} if rng.random() < 0.5 and dp > 1 else set()
        has_layouts = rng.random() < 0.8
        calls = {}
        for rank in everyone:
            pp, stage = grid(2, dp)(rank)
            axes = [Axis(pp, "pp", f"pp{rank % dp}", root)]
            post = make_post(rank, size, [stage] if has_layouts and rank not in empty else [], axes)
            calls[rank] = post, list(everyone if has_layouts else pp)
        return calls
    if kind == "path":
        # Ranks that know one or two others each, in any order.
        ranks = rng.sample(everyone, rng.randint(2, size))
        links = [ascending((ranks[i], rng.choice(ranks[:i]))) for i in range(1, len(ranks))]
        return {r: (make_post(r, size, [link for link in links if r in link]), sorted(ranks)) for r in ranks}
    if kind == "two models":
        ranks = rng.sample(everyone, size // 2 * 2)
        halves = ascending(tuple(ranks[::2])), ascending(tuple(ranks[1::2]))
        return {rank: (make_post(rank, size, [half]), list(half)) for half in halves for rank in half}
    if kind == "experts":
        some = ascending(tuple(rng.sample(everyone, 2)))
        groups = {rank: [everyone, some] if rank in some else [everyone] for rank in everyone}
        return {rank: (make_post(rank, size, groups[rank]), list(everyone)) for rank in everyone}
    group = everyone if kind == "whole" else ascending(tuple(rng.sample(everyone, rng.randint(2, size))))
    failed = rng.choice(group) if kind == "error" else None
    calls = {}
    for rank in group:
        more = num_groups + (rng.randrange(2) if kind == "number" else 0)
        error = ("ArgumentError", "bad") if rank == failed else None
        post = make_post(rank, size, [group], num_groups=more, error=error)
        calls[rank] = post, None if failed is not None else list(group)
    return calls


def test_sequences_of_first_calls_with_late_ranks() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        size = rng.randint(2, 6)
        calls = [random_call(rng, size) for _ in range(rng.randint(2, 4))]
        delays = [[rng.choice([0, 0, 0.01, 0.1]) for _ in range(size)] for _ in calls]

        def join_all(store: SimulatedStore, calls=calls, delays=delays) -> list[object]:  # type: ignore[no-untyped-def]
            rendezvous, results = Rendezvous(store, store.rank, store), list[object]()
            for call, delay in zip(calls, delays, strict=True):
                store.sleep(delay[store.rank])
                if store.rank in call:
                    try:
                        results.append(list(rendezvous.join(call[store.rank][0], MINUTES).ranks))
                    except DistclipError as error:
                        results.append(error)
            return results

        results, _ = run_ranks(join_all, size, seed)
        for rank in range(size):
            expected = [call[rank][1] for call in calls if rank in call]
            found = [None if isinstance(one, ArgumentError) else one for one in results[rank]]
            assert found == expected, (seed, rank)


# ---- Costs ----


def pp_of_groups(rank: int, size: int) -> tuple[list[Ranks], list[Axis]]:
    pp, stage = grid(4, size // 4)(rank)
    return [stage], [Axis(pp, "pp", f"pp{rank % (size // 4)}")]


def costs_of(
    layout: Callable[[int, int], tuple[list[Ranks], list[Axis]]], size: int, **more: object
) -> list[RankCosts]:
    posts = [make_post(rank, size, *layout(rank, size), **more) for rank in range(size)]
    join = lambda store: Rendezvous(store, store.rank, store).join(posts[store.rank], MINUTES).ranks  # noqa: E731
    results, costs = run_ranks(join, size)
    assert set(results) == {tuple(range(size))}
    return costs


@pytest.mark.parametrize("size", [64, 256])
def test_stages_of_process_groups_cost_constant_messages(size: int) -> None:
    costs = costs_of(pp_of_groups, size)
    assert max(one.operations for one in costs) <= 8
    assert max(one.sent + one.received for one in costs) <= 512


@pytest.mark.parametrize("size", [64, 256])
def test_search_costs_at_most_64_kib(size: int) -> None:
    def ring(rank: int, size: int) -> tuple[list[Ranks], list[Axis]]:
        """Return groups of which no rank can derive the component."""
        return [ascending((rank, (rank + 1) % size)), ascending((rank, (rank - 1) % size))], []

    costs = costs_of(ring, size)
    assert max(one.sent + one.received for one in costs) <= 64 * 1024
    assert sum(one.operations for one in costs) <= 20 * size


def test_ranks_are_written_as_ranges() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ranks = tuple(rng.sample(range(30), rng.randint(0, 12)))
        assert decode_ranks(encode_ranks(ranks)) == ranks
        assert decode_ranks(encode_ranks(sorted(ranks))) == tuple(sorted(ranks))
    assert len(encode_ranks(range(3, 65536, 8))) < 16
