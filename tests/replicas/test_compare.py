"""Find the replica that differs, and the reason why replicas that are only assumed do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from distclip.errors import LayoutError, ReplicaError, ReplicaWarning
from distclip.replicas.compare import Comparison, ReplicaInfo, compare_replicas
from distclip.replicas.incidents import ReplicaLog, check_contradiction
from distclip.replicas.rules import RULES


def info(name: str, checksum: int, power: float = 4.0, **changes: Any) -> ReplicaInfo:
    fields = {"kind": "gradient", "shape": (2,), "ranks": (0, 1, 2), "is_exact": True, "num_bytes": 8} | changes
    return ReplicaInfo(name=name, checksum=checksum, power=power, **fields)


def compare(*by_rank: list[ReplicaInfo]) -> Comparison:
    return compare_replicas(dict(enumerate(by_rank)))


def test_equal_replicas_do_not_differ() -> None:
    result = compare(*[[info("a", 1), info("b", 2, is_exact=False)]] * 3)
    assert result == Comparison((), frozenset())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_replica_of_three_is_found(rank: int) -> None:
    by_rank = [[info("a", 7), info("b", 100 + 16 * (r == rank), 4.0 + 5 * (r == rank))] for r in range(3)]
    (difference,) = compare(*by_rank).differences
    assert (difference.name, difference.ranks, difference.group) == ("b", (rank,), (0, 1, 2))
    assert difference.norm == pytest.approx(0.5)
    assert difference.bit == 4
    assert difference.has_majority


def test_two_replicas_are_both_named() -> None:
    (difference,) = compare([info("a", 3, ranks=(0, 1))], [info("a", 8, ranks=(0, 1))]).differences
    assert difference.ranks == (0, 1)
    assert difference.bit is None
    assert not difference.has_majority
    assert "between ranks 0, 1" in str(difference)


def test_a_bit_that_flips_the_sign_wraps_around() -> None:
    (difference,) = compare([info("a", 2**31 + 5)], [info("a", 5)], [info("a", 5)]).differences
    assert difference.bit == 31


def test_groups_are_compared_apart() -> None:
    """HSDP over four ranks: two shards with two replicas each."""
    by_rank = [[info("w", 10 + r % 2 + 64 * (r == 3), ranks=(r % 2, r % 2 + 2))] for r in range(4)]
    (difference,) = compare(*by_rank).differences
    assert difference.group == (1, 3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nan_in_one_computed_replica_is_no_rounding_error(rank: int) -> None:
    nan = float("nan")
    by_rank = [[info("a", 7 + 99 * (r == rank), nan if r == rank else 4.0, is_exact=False)] for r in range(3)]
    (difference,) = compare(*by_rank).differences
    assert difference.ranks == (rank,)
    # Replicas that are all NaN, with other bits, do not differ by more than rounding.
    assert compare(*[[info("a", 90 + 7 * r, nan, is_exact=False)] for r in range(3)]).differences == ()


def test_tied_parameters_are_matched_by_their_order() -> None:
    by_rank = [[info("embed", 1), info("other", 5, ranks=(0, 1))], [info("head", 1), info("other", 5, ranks=(0, 1))]]
    assert not compare(*by_rank, [info("embed", 1)]).differences
    (difference,) = compare(*by_rank, [info("last", 2)]).differences
    assert (difference.name, difference.names, difference.ranks) == ("embed", ("embed", "head", "last"), (2,))


def test_missing_gradient_is_one_of_zeros() -> None:
    assert not compare([info("a", 0, 0.0)], [], [info("a", 0, 0.0)]).differences
    (difference,) = compare([info("a", 3)], [], [info("a", 3)]).differences
    assert difference.ranks == (1,)
    assert difference.names == ("a", "", "a")
    with pytest.raises(ReplicaError, match="no such tensor"):
        RULES["repair"].resolve(1, (difference,), ReplicaLog())


def assumed(name: str, checksum: int, power: float = 4.0, **changes: Any) -> ReplicaInfo:
    return info(name, checksum, power, is_exact=False, **changes)


def test_rounding_errors_of_replicas_that_each_rank_computes_are_no_difference() -> None:
    by_rank = [[assumed("a", 100 * r, 4 + 1e-8 * r), assumed("b", 70 * r)] for r in range(3)]
    assert compare(*by_rank) == Comparison((), frozenset({(0, 1, 2)}))


def test_a_single_flipped_bit_is_no_rounding_error() -> None:
    (difference,) = compare([assumed("a", 5), assumed("b", 1)], *[[assumed("a", 4), assumed("b", 1)]] * 2).differences
    assert (difference.name, difference.ranks, difference.bit) == ("a", (0,), 0)


def test_power_sums_that_differ_are_a_difference() -> None:
    by_rank = [[assumed("a", 100 * r, 4 + 1e-4 * (r == 1)), assumed("b", 70 * r)] for r in range(3)]
    result = compare(*by_rank)
    assert [difference.name for difference in result.differences] == ["a"]
    assert result.rounded == {(0, 1, 2)}


def parameters(*checksums: int) -> list[ReplicaInfo]:
    return [assumed(f"w{i}", checksum, kind="parameter") for i, checksum in enumerate(checksums)]


@pytest.mark.parametrize(
    ("by_rank", "cause"),
    [
        ([[assumed("w0", r, 4.0 + r), assumed("w1", r, 4.0 + r), *parameters(r, 8)] for r in range(3)], "split_over="),
        ([[assumed("w0", r, 4.0 + r), *parameters(5), *[assumed("x", 0, kind="parameter")] * r] for r in range(3)],
         "split_over="),
        ([[assumed("w0", r, 4.0 + r), assumed("w1", 7), *parameters(5, 8)] for r in range(3)], "all-reduce"),
        ([[assumed("w0", r, 4.0 + r), assumed("w1", r, 4.0 + r), *parameters(5)] for r in range(3)], "different data"),
    ],
)  # fmt: skip
def test_likely_cause(by_rank: list[list[ReplicaInfo]], cause: str) -> None:
    assert cause in compare(*by_rank).differences[0].cause


def test_replicas_along_an_axis_that_splits_them_are_a_contradiction() -> None:
    by_rank = [[info("a", r, 4.0 + r, split_along=("pp over ranks [0, 1, 2]",))] for r in range(3)]
    with pytest.raises(LayoutError, match="pp over ranks"):
        check_contradiction(compare(*by_rank).differences)
    check_contradiction(compare(*[by_rank[0]] * 3).differences)


def test_rules() -> None:
    differences = compare([info("a", 3)], [info("a", 3)], [info("a", 4)]).differences
    log = ReplicaLog()
    with pytest.warns(ReplicaWarning, match="a on rank 2 differs from that on ranks 0, 1"):
        assert not RULES["warn"].resolve(1, differences, log)
    with pytest.raises(ReplicaError, match=r"step 2: .* rank 2 .* No gradient was changed"):
        RULES["raise"].resolve(2, differences, log)
    with pytest.warns(ReplicaWarning, match="overwritten"):
        assert RULES["repair"].resolve(3, differences, log)
    assert [(incident.step, incident.action) for incident in log.incidents] == [
        (1, "warn"),
        (2, "raise"),
        (3, "repair"),
    ]
    no_majority = compare([info("a", 3)], [info("a", 5)], [info("a", 4)]).differences
    with pytest.raises(ReplicaError, match="majority"):
        RULES["repair"].resolve(4, no_majority, log)
    with pytest.raises(ReplicaError, match="only assumed"):
        RULES["repair"].resolve(5, compare([assumed("a", 3)], *[[assumed("a", 1, 9.0)]] * 2).differences, log)


def test_warnings_about_replicas_that_stay_different_become_rare() -> None:
    differences = compare([info("a", 3)], [info("a", 3)], [info("a", 4)]).differences
    log = ReplicaLog()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(100):
            log.warn(step, differences)
    assert len(caught) == 7
    assert len(log.incidents) == 100
