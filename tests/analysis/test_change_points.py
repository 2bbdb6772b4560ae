"""Regimes of norms whose levels are known, in short and in long runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distclip.monitor.analysis.change_points import find_regimes
from tests.logs import Floats, make_log, steady_norms

LENGTHS = pytest.mark.parametrize("steps", [200, 400, 3000, 1_000_000])


def with_spikes(steps: int) -> Floats:
    norms = steady_norms(steps)
    norms[np.random.default_rng(1).integers(steps, size=steps // 50)] *= 50
    return norms


def with_burst(steps: int) -> Floats:
    norms = steady_norms(steps)
    norms[steps // 2 : steps // 2 + 8] *= 50
    return norms


def correlated(steps: int) -> Floats:
    logs = np.zeros(steps)
    shocks = np.random.default_rng(1).normal(0, 0.1, min(steps, 3000))
    for step in range(1, len(shocks)):
        logs[step] = 0.95 * logs[step - 1] + shocks[step]
    return np.exp(logs)


def heavy_tailed(steps: int) -> Floats:
    return np.exp(np.clip(0.4 * np.random.default_rng(1).standard_t(2, steps), -300, 300))


ONE_LEVEL = {
    "constant": lambda steps: np.full(steps, 3.0),
    "steady": steady_norms,
    "wide scatter": lambda steps: steady_norms(steps, scatter=1.5),
    "spikes": with_spikes,
    "burst": with_burst,
    "heavy tails": heavy_tailed,
    "correlated": correlated,
    "zeros": np.zeros,
}


@LENGTHS
@pytest.mark.parametrize("name", ONE_LEVEL)
def test_one_level_is_one_regime(steps: int, name: str) -> None:
    norms = ONE_LEVEL[name](steps)
    regimes = find_regimes(make_log(norms))
    assert (len(regimes.warm_up), len(regimes.steady)) == (0, 1)
    assert (regimes.last.start, regimes.last.stop, regimes.last.first, regimes.last.last) == (0, steps, 1, steps)
    assert regimes.last.median == np.median(norms)
    assert len(regimes.norms_of(regimes.last)) == steps


@LENGTHS
@pytest.mark.parametrize("factor", [3.0, 1 / 3])
@pytest.mark.parametrize("position", [0.4, 0.8])
def test_jump_separates_two_regimes(steps: int, factor: float, position: float) -> None:
    edge = int(position * steps)
    norms = steady_norms(steps)
    norms[edge:] *= factor
    regimes = find_regimes(make_log(norms))
    before, after = regimes.steady
    assert regimes.warm_up == ()
    assert regimes.last is after
    assert abs(before.stop - edge) <= max(10, steps / 100)
    assert before.stop == after.start
    assert after.stop == steps
    assert after.first == before.last + 1
    assert after.median / before.median == pytest.approx(factor, rel=0.1)


def test_burst_does_not_hide_a_jump() -> None:
    norms = steady_norms(400)
    norms[200:] *= 3
    norms[300:308] *= 1e6
    before, after = find_regimes(make_log(norms)).steady
    assert abs(before.stop - 200) <= 10
    assert after.stop == 400


@LENGTHS
def test_warm_up_precedes_one_regime(steps: int) -> None:
    decreasing = 1 + 10 * np.exp(-np.arange(steps) / (steps / 20))
    for shape in (decreasing, 1 / decreasing):
        regimes = find_regimes(make_log(steady_norms(steps) * shape))
        assert len(regimes.steady) == 1
        assert regimes.warm_up
        assert steps / 50 < regimes.last.start < steps / 3
        assert regimes.last.median == pytest.approx(shape[-1], rel=0.15)


@LENGTHS
def test_drift_becomes_increasing_levels(steps: int) -> None:
    regimes = find_regimes(make_log(steady_norms(steps) * 16 ** (np.arange(steps) / steps)))
    levels = [segment.median for segment in (*regimes.warm_up, *regimes.steady)]
    assert len(regimes.steady) > 1
    assert levels == sorted(levels)


def test_nonfinite_norms_are_ignored() -> None:
    norms = steady_norms(600)
    norms[300:] *= 4
    holes = np.insert(norms, slice(0, 600, 3), np.nan)
    with_holes, without = find_regimes(make_log(holes)), find_regimes(make_log(norms))
    assert [segment.median for segment in with_holes.steady] == [segment.median for segment in without.steady]
    assert with_holes.last.first == with_holes.indices[without.last.start] + 1
    assert find_regimes(make_log([np.nan] * 5)).steady == ()
    assert find_regimes(make_log([])).steady == ()


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1e300) | st.just(float("nan")), min_size=1, max_size=300))
def test_segments_cover_all_finite_norms(norms: list[float]) -> None:
    regimes = find_regimes(make_log(norms))
    segments = [*regimes.warm_up, *regimes.steady]
    num_finite = int(np.isfinite(norms).sum())
    assert [0, *(segment.stop for segment in segments)] == [*(segment.start for segment in segments), num_finite]
    assert all(len(segment) > 0 and segment.first <= segment.last for segment in segments)
    assert regimes.steady or not num_finite
