"""Regimes of norms whose level is known, in short runs and in long ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distclip.monitor.analysis.regimes import find_regimes
from tests.analysis.by_hand import log_of, usual

LENGTHS = pytest.mark.parametrize("steps", [200, 400, 3000, 1_000_000])


@LENGTHS
def test_one_level(steps: int) -> None:
    generator = np.random.default_rng(1)
    spikes, burst, noise = usual(steps), usual(steps), np.zeros(steps)
    spikes[generator.integers(steps, size=steps // 50)] *= 50
    burst[steps // 2 : steps // 2 + 8] *= 50
    shocks = generator.normal(0, 0.1, min(steps, 3000))
    for step in range(1, len(shocks)):
        noise[step] = 0.95 * noise[step - 1] + shocks[step]
    tails = np.exp(np.clip(0.4 * generator.standard_t(2, steps), -300, 300))
    for name, norms in {
        "the same": np.full(steps, 3.0),
        "usual": usual(steps),
        "wide scatter": usual(steps, scatter=1.5),
        "spikes": spikes,
        "a burst": burst,
        "heavy tails": tails,
        "neighbours alike": np.exp(noise),
        "zeros": np.zeros(steps),
    }.items():
        found = find_regimes(log_of(norms))
        assert (len(found.warm_up), len(found.settled)) == (0, 1), name
        assert (found.last.start, found.last.stop, found.last.first, found.last.last) == (0, steps, 1, steps)
        assert found.last.median == np.median(norms) and len(found.of(found.last)) == steps


@LENGTHS
@pytest.mark.parametrize("factor", [3.0, 1 / 3])
@pytest.mark.parametrize("at", [0.4, 0.8])
def test_a_jump(steps: int, factor: float, at: float) -> None:
    edge = int(at * steps)
    norms = usual(steps)
    norms[edge:] *= factor
    found = find_regimes(log_of(norms))
    before, after = found.settled
    assert found.warm_up == () and found.last is after
    assert abs(before.stop - edge) <= max(10, steps / 100) and before.stop == after.start and after.stop == steps
    assert after.first == before.last + 1 and after.median / before.median == pytest.approx(factor, rel=0.1)


def test_a_burst_does_not_hide_a_jump() -> None:
    norms = usual(400)
    norms[200:] *= 3
    norms[300:308] *= 1e6
    before, after = find_regimes(log_of(norms)).settled
    assert abs(before.stop - 200) <= 10 and after.stop == 400


@LENGTHS
def test_a_warm_up(steps: int) -> None:
    falling = 1 + 10 * np.exp(-np.arange(steps) / (steps / 20))
    for shape in (falling, 1 / falling):
        found = find_regimes(log_of(usual(steps) * shape))
        assert len(found.settled) == 1 and found.warm_up
        assert steps / 50 < found.last.start < steps / 3
        assert found.last.median == pytest.approx(shape[-1], rel=0.15)


@LENGTHS
def test_a_drift_is_stairs(steps: int) -> None:
    found = find_regimes(log_of(usual(steps) * 16 ** (np.arange(steps) / steps)))
    levels = [each.median for each in (*found.warm_up, *found.settled)]
    assert len(found.settled) > 1 and levels == sorted(levels)


def test_what_is_not_finite_is_not_there() -> None:
    norms = usual(600)
    norms[300:] *= 4
    holes = np.insert(norms, slice(0, 600, 3), np.nan)
    with_holes, without = find_regimes(log_of(holes)), find_regimes(log_of(norms))
    assert [each.median for each in with_holes.settled] == [each.median for each in without.settled]
    assert with_holes.last.first == with_holes.where[without.last.start] + 1
    assert find_regimes(log_of([np.nan] * 5)).settled == () and find_regimes(log_of([])).settled == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e300) | st.just(float("nan")), min_size=1, max_size=300))
def test_segments_are_the_whole_run(norms: list[float]) -> None:
    found = find_regimes(log_of(norms))
    segments = [*found.warm_up, *found.settled]
    finite = int(np.isfinite(norms).sum())
    assert [0, *(each.stop for each in segments)] == [*(each.start for each in segments), finite]
    assert all(len(each) > 0 and each.first <= each.last for each in segments) and (found.settled or not finite)
