"""Which steps stand out: against the plain definition, whatever the norms."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distclip.monitor.extremes import Extremes

NORMS = st.lists(st.floats(0, 1e6) | st.sampled_from([1.0, 100.0, math.nan, math.inf]), max_size=300)


def plainly(norms: list[float], top: int, window: int) -> list[tuple[int, float]]:
    """By position, every ratio of 2 or more that fewer than `top` before it reach; the first that are not finite."""
    found, ratios, finite, nonfinite = [], [], [], 0
    for i, norm in enumerate(norms):
        if not math.isfinite(norm):
            nonfinite += 1
            if nonfinite <= top:
                found.append((i, math.nan))
            continue
        usual = statistics.median_high(finite[-window:]) if len(finite) >= 5 else math.inf
        ratio = norm / usual if usual > 0 else math.inf
        finite.append(norm)
        if ratio >= 2 and sum(other >= ratio for other in ratios) < top:
            found.append((i, ratio))
            ratios.append(ratio)
    return found


@given(NORMS, st.integers(0, 5), st.sampled_from([5, 16, 128]), st.integers(1, 40))
def test_the_most_extreme_so_far(norms: list[float], top: int, window: int, every: int) -> None:
    extremes = Extremes(top, window)
    found = [
        (begin + i, ratio)
        for begin in range(0, len(norms), every)
        for i, ratio in extremes.among(norms[begin : begin + every])
    ]
    expected = plainly(norms, top, window)
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [ratio for _, ratio in found] == pytest.approx([ratio for _, ratio in expected], nan_ok=True)


def test_a_calm_run_has_none() -> None:
    assert not Extremes(20).among([1.0 + 0.5 * math.sin(step) for step in range(1000)])


def test_what_is_no_more_extreme_than_what_is_known_is_not_told_of() -> None:
    assert Extremes(1).among([1.0] * 5 + [3.0, 3.0]) == [(5, 3.0)]


def test_an_early_transient_does_not_hide_what_comes_later() -> None:
    norms = [100.0 * 0.9**step + 1 for step in range(200)]
    norms[150] = 10.0
    assert [i for i, _ in Extremes(1).among(norms)] == [150]
