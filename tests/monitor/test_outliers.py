"""Detection of outliers: it agrees with a plain definition for any norms."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distclip.monitor.outliers import OutlierDetector

NORMS = st.lists(st.floats(0, 1e6) | st.sampled_from([1.0, 100.0, math.nan, math.inf]), max_size=300)


def detect_slowly(norms: list[float], top: int, window: int) -> list[tuple[int, float]]:
    """Return each ratio of at least 2 that fewer than `top` earlier ones reach, and the first non-finite norms."""
    outliers, ratios, finite, num_nonfinite = [], [], [], 0
    for i, norm in enumerate(norms):
        if not math.isfinite(norm):
            num_nonfinite += 1
            if num_nonfinite <= top:
                outliers.append((i, math.nan))
            continue
        median = statistics.median_high(finite[-window:]) if len(finite) >= 5 else math.inf
        ratio = norm / median if median > 0 else math.inf
        finite.append(norm)
        if ratio >= 2 and sum(other >= ratio for other in ratios) < top:
            outliers.append((i, ratio))
            ratios.append(ratio)
    return outliers


@given(NORMS, st.integers(0, 5), st.sampled_from([5, 16, 128]), st.integers(1, 40))
def test_detects_most_extreme_norms_so_far(norms: list[float], top: int, window: int, every: int) -> None:
    detector = OutlierDetector(top, window)
    outliers = [
        (begin + i, ratio)
        for begin in range(0, len(norms), every)
        for i, ratio in detector.detect(norms[begin : begin + every])
    ]
    expected = detect_slowly(norms, top, window)
    assert [i for i, _ in outliers] == [i for i, _ in expected]
    assert [ratio for _, ratio in outliers] == pytest.approx([ratio for _, ratio in expected], nan_ok=True)


def test_calm_run_has_no_outliers() -> None:
    assert not OutlierDetector(20).detect([1.0 + 0.5 * math.sin(step) for step in range(1000)])


def test_equal_ratio_is_not_reported_again() -> None:
    assert OutlierDetector(1).detect([1.0] * 5 + [3.0, 3.0]) == [(5, 3.0)]


def test_initial_decrease_does_not_hide_a_later_outlier() -> None:
    norms = [100.0 * 0.9**step + 1 for step in range(200)]
    norms[150] = 10.0
    assert [i for i, _ in OutlierDetector(1).detect(norms)] == [150]
