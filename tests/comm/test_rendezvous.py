"""Find the ranks that take part in a call through a store: simulated ranks in virtual time, and threads."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore

from distclip import ArgumentError, DisagreementError
from distclip.bench.simulated import RankCosts, SimulatedStore, run_ranks
from distclip.comm import rendezvous
from distclip.comm.ranks import Axis, Grid, Ranks, ascending, decode_ranks, encode_ranks, pack_ranks, unpack_ranks
from distclip.comm.rendezvous import Post, Rendezvous
from distclip.errors import DistclipError

MINUTES, SECONDS = timedelta(minutes=30), timedelta(seconds=5)


def grid(pp: int, dp: int) -> Callable[[int], tuple[Ranks, Ranks]]:
    """Return a function from a rank to its pipeline group and its data-parallel group."""
    return lambda rank: (
        tuple(range(rank % dp, pp * dp, dp)),
        tuple(range(rank // dp * dp, rank // dp * dp + dp)),
    )


def make_post(rank: int, size: int, groups: Sequence[Ranks], axes: Sequence[Axis] = (), **more: object) -> Post:
    """Return the post of a rank that has these groups and axes."""
    spans = {ascending(ranks) for ranks in (*groups, *(axis.ranks for axis in axes))}
    known = rendezvous.derive_component(groups, axes, rank, size)
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


@pytest.fixture(params=[128, 2], ids=["one leads", "each leads"])
def chain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ranks pass the lead of a search on after two posts."""
    monkeypatch.setattr(rendezvous, "_MAX_POSTS", request.param)


@pytest.mark.usefixtures("chain")
def test_finds_neighbors_of_neighbors() -> None:
    assert agree({rank: stage_post(rank) for rank in range(4)}) == dict.fromkeys(range(4), [0, 1, 2, 3])


@pytest.mark.parametrize("empty", [{3}, {0}, {2, 3}, {0, 3}])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("chain")
def test_ranks_that_hold_nothing_take_part(empty: set[int], seed: int) -> None:
    results = agree({rank: stage_post(rank, empty=rank in empty) for rank in range(4)}, seed=seed)
    assert results == dict.fromkeys(range(4), [0, 1, 2, 3])


def test_models_on_other_ranks_do_not_take_part() -> None:
    posts = {rank: make_post(rank, 4, [(0, 1) if rank < 2 else (2, 3)]) for rank in range(4)}
    assert agree(posts) == {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}


def test_repeats_on_the_same_store() -> None:
    store = HashStore()

    def join(rank: int) -> list[list[int]]:
        finder = Rendezvous(store, rank)
        return [list(finder.join(stage_post(rank, empty=rank == 3 and i % 4 == 1), MINUTES).ranks) for i in range(9)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(join, range(4))) == [[[0, 1, 2, 3]] * 9] * 4


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.usefixtures("chain")
def test_error_of_one_rank_is_raised_by_all(knows: bool) -> None:
    failed = ("ArgumentError", "max_norm=-1.0: negative")
    results = agree({r: stage_post(r, empty=r == 2 and not knows, error=failed if r == 3 else None) for r in range(4)})
    assert {type(error) for error in results.values()} == {ArgumentError}
    assert {str(error) for error in results.values()} == {"rank 3: max_norm=-1.0: negative"}


@pytest.mark.parametrize("other", ["another axis", "nothing", "another line"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("chain")
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
@pytest.mark.usefixtures("chain")
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


@pytest.mark.parametrize("seed", range(4))
def test_missing_rank_of_a_search_is_named_by_all(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the rank that waits goes back to all that have led before it."""
    monkeypatch.setattr(rendezvous, "_MAX_POSTS", 2)
    missing = random.Random(seed).randrange(1, 12)
    posts = {rank: Post(grid(3, 4)(rank)) for rank in range(12) if rank != missing}
    errors = agree(posts, timedelta(seconds=5), seed).values()
    assert {type(error) for error in errors} == {DisagreementError}
    assert len({str(error) for error in errors}) == 1
    assert all(f"1 of 12 ranks (rank {missing})" in str(error) for error in errors)


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize("seed", range(2))
def test_rank_that_gives_up_fails_the_search_on_all(seed: int) -> None:
    """One rank comes while the others give up. No rank succeeds without the others."""
    late = random.Random(seed).randrange(6)
    for delay in (4.999, 5.001, 24.99, 25.001):
        posts = [Post(grid(2, 3)(rank)) for rank in range(6)]

        def join(store: SimulatedStore, delay: float = delay, posts: list[Post] = posts) -> object:
            store.sleep(delay if store.rank == late else 0)
            try:
                return list(Rendezvous(store, store.rank, store).join(posts[store.rank], SECONDS).ranks)
            except DistclipError as error:
                return error

        results, _ = run_ranks(join, 6, seed)
        assert {isinstance(result, list) for result in results} in ({True}, {False}), (delay, results)


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


def as_searches(call: dict[int, tuple[Post, Any]], rng: random.Random) -> dict[int, tuple[Post, Any]]:
    """Return a call in which no rank, or not every rank, can derive the component."""
    num = rng.choice([0, len(call) // 2, len(call), len(call)])
    unaware = rng.sample(sorted(call), num)
    return {r: (replace(post, known=None) if r in unaware else post, expected) for r, (post, expected) in call.items()}


@pytest.mark.parametrize("first_seed", range(0, 240, 40))
def test_sequences_of_first_calls_with_late_ranks(first_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(first_seed, first_seed + 40):
        monkeypatch.setattr(rendezvous, "_MAX_POSTS", (128, 2, 3)[seed % 3])
        rng = random.Random(seed)
        size = rng.randint(2, 6)
        calls = [random_call(rng, size) for _ in range(rng.randint(2, 4))]
        if seed % 3:
            # In half of the calls all ranks search, in some others a part of them.
            calls = [as_searches(call, rng) for call in calls]
        delays = [[rng.choice([0, 0, 0.01, 0.1]) for _ in range(size)] for _ in calls]

        def join_all(store: SimulatedStore, calls=calls, delays=delays) -> list[object]:  # type: ignore[no-untyped-def]
            finder, results = Rendezvous(store, store.rank, store), list[object]()
            for call, delay in zip(calls, delays, strict=True):
                store.sleep(delay[store.rank])
                if store.rank in call:
                    try:
                        results.append(list(finder.join(call[store.rank][0], MINUTES).ranks))
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


def ring(rank: int, size: int) -> tuple[list[Ranks], list[Axis]]:
    """Return groups of which no rank can derive the component."""
    return [ascending((rank, (rank + 1) % size)), ascending((rank, (rank - 1) % size))], []


def shuffled_ring(rank: int, size: int) -> tuple[list[Ranks], list[Axis]]:
    """Return groups of a ring whose ranks are in a random order. Many of them begin to lead."""
    order = random.Random(0).sample(range(size), size)
    i = order.index(rank)
    return [ascending((rank, order[(i + 1) % size])), ascending((rank, order[i - 1]))], []


def group_of_all(rank: int, size: int) -> tuple[list[Ranks], list[Axis]]:
    """Return a group of all ranks. In this test no rank derives that it is the component."""
    return [tuple(range(size))], []


@pytest.mark.parametrize("layout", [ring, shuffled_ring, group_of_all, pp_of_groups])
def test_no_rank_of_a_search_sends_more_in_a_larger_job(
    layout: Callable[[int, int], tuple[list[Ranks], list[Axis]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "derive_component", lambda *args: None)
    small, large = (costs_of(layout, size) for size in (64, 256))
    assert max(one.sent + one.received for one in large) <= 64 * 1024
    assert sum(one.operations for one in large) <= 25 * 256
    monkeypatch.setattr(rendezvous, "_MAX_POSTS", 16)
    small, large = (costs_of(layout, size) for size in (64, 256))
    ratio = max(one.sent + one.received for one in large) / max(one.sent + one.received for one in small)
    assert ratio < 1.5


def test_ranks_are_written_as_ranges() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ranks = tuple(rng.sample(range(30), rng.randint(0, 12)))
        assert decode_ranks(encode_ranks(ranks)) == ranks
        assert decode_ranks(encode_ranks(sorted(ranks))) == tuple(sorted(ranks))
        many = tuple(sorted(rng.sample(range(3000), rng.choice([0, 1, 50, 1500]))))
        assert unpack_ranks(pack_ranks(many)) == many
        assert len(pack_ranks(many)) < 600
    assert len(encode_ranks(range(3, 65536, 8))) < 16
