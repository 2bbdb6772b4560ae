"""Suggested bounds for norms whose percentiles are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distclip
from distclip.monitor.analysis import suggest as suggest_module
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.suggest import round_bound, suggest
from tests.logs import HEADER, Floats, make_lines, make_log, steady_norms, write_and_read


def test_steady_run() -> None:
    norms = steady_norms(4000)
    suggestion = suggest(make_log(norms))
    p75, p90, p95 = np.percentile(norms, [75, 90, 95])
    assert suggestion.max_norm == pytest.approx(p90, rel=0.025)
    assert (suggestion.low, suggestion.high) == (p75, p95)
    # The 90th percentile of a log-normal with scatter 0.25 is exp(0.25 · 1.2816).
    assert suggestion.interval[0] < math.exp(0.3204) < suggestion.interval[1] < 1.1 * suggestion.interval[0]
    assert suggestion.max_norm == 1.38
    assert suggestion.override == "clip=global_norm clip.max_norm=1.38"
    assert suggestion.python == "distclip.GradClipper(model, distclip.global_norm(1.38))"
    assert (suggestion.num_steps, suggestion.num_nonfinite) == (4000, 0)
    assert (suggestion.cap, suggestion.current) == (None, None)
    assert suggestion.notes == ()
    assert suggestion.cautions == ()
    for excerpt in ("Clip at 1.38", "steps 1 to 4000", "p75 to p95"):
        assert excerpt in suggestion.text
    assert suggest(make_log(norms)) == suggestion


def test_python_expression_is_valid() -> None:
    namespace = {"distclip": distclip, "model": torch.nn.Linear(2, 2)}
    for norms in (steady_norms(400), steady_norms(1500) * 4 ** (np.arange(1500) / 1500)):
        assert isinstance(eval(suggest(make_log(norms)).python, namespace), distclip.GradClipper)


def test_candidates() -> None:
    """The norms are 1 … 1.5. The largest tenth of each 200 steps is consecutive."""
    generator = np.random.default_rng(0)
    values = np.linspace(1, 1.5, 1001)[1:].reshape(5, 200)
    # Each 200 steps have every fifth value, the largest 20 of them last.
    norms = np.concatenate(
        [np.append(generator.permutation(part[:-20]), part[-20:]) for part in values.T.reshape(5, 200, order="F")]
    )
    candidates = {candidate.name: candidate for candidate in suggest(make_log(norms)).candidates}
    rates = {name: round(candidate.clip_rate, 3) for name, candidate in candidates.items()}
    assert rates == {"p50": 0.5, "p75": 0.25, "p90": 0.1, "p95": 0.05, "p99": 0.01, "max": 0.0}
    assert [candidates[name].longest_streak for name in ("p90", "p99", "max")] == [20, 2, 0]
    expected = np.minimum(1, candidates["p75"].bound / norms).mean()
    assert candidates["p75"].mean_coef == pytest.approx(expected, rel=1e-12)
    assert candidates["max"].mean_coef == 1
    assert [candidates[name].role for name in ("p75", "p99", "max")] == ["limiter", "safety net", "inactive"]


@pytest.mark.parametrize(
    ("bound", "role"), [(100.0, "inactive"), (1.6, "safety net"), (1.2, "limiter"), (0.5, "normaliser")]
)
def test_current_bound(bound: float, role: str, tmp_path: Path) -> None:
    norms = steady_norms(1000)
    suggestion = suggest(write_and_read(tmp_path, HEADER, make_lines(norms, bound=bound)))
    assert suggestion.current is not None
    assert (suggestion.current.bound, suggestion.current.role) == (bound, role)
    assert suggestion.current.clip_rate == (norms > bound).mean()
    is_clipped_often = any("were clipped" in caution for caution in suggestion.cautions)
    assert is_clipped_often == (role in ("limiter", "normaliser"))


def test_current_bound_of_a_log_without_bounds(tmp_path: Path) -> None:
    lines = [{key: line[key] for key in ("step", "norm", "coef")} for line in make_lines(steady_norms(300), bound=1.2)]
    current = suggest(write_and_read(tmp_path / "fixed", lines)).current
    assert current is not None
    assert current.bound == pytest.approx(1.2)
    assert current.role == "limiter"
    for line in lines:
        line["coef"] **= 2
    current = suggest(write_and_read(tmp_path / "varies", lines)).current
    assert current is not None
    assert math.isnan(current.bound)
    assert current.role == "limiter"


def test_only_the_last_regime_counts() -> None:
    norms = np.concatenate([10 * steady_norms(100), steady_norms(500, 1), 1.8 * steady_norms(400, 2)])
    suggestion = suggest(make_log(norms))
    assert abs(suggestion.segment.first - 601) <= 20
    assert suggestion.max_norm == pytest.approx(1.8 * 1.38, rel=0.08)
    warm_up, change = suggestion.notes
    assert "Warm-up until step 100" in warm_up
    assert "At step 60" in change
    assert "the last regime" in suggestion.text
    assert suggestion.cap is None


@pytest.mark.parametrize("exponents", [np.arange(2000) / 2000, 1 - np.arange(2000) / 2000], ids=["up", "down"])
def test_drift_suggests_an_adaptive_policy(exponents: Floats) -> None:
    norms = steady_norms(2000) * 4**exponents
    suggestion = suggest(make_log(norms))
    assert suggestion.drift > 2
    assert suggestion.cap is not None
    assert np.percentile(norms, 90) < suggestion.cap < norms.max()
    assert suggestion.override == f"clip=median_mad clip.cap={suggestion.cap:g}"
    assert suggestion.python == f"distclip.GradClipper(model, distclip.median_mad(3, cap={suggestion.cap:g}))"
    assert any("adaptive" in caution for caution in suggestion.cautions)


def test_small_drift_suggests_a_fixed_bound() -> None:
    assert suggest(make_log(steady_norms(2000) * 1.8 ** (np.arange(2000) / 2000))).cap is None


def test_nonfinite_norms_are_ignored() -> None:
    norms = steady_norms(1000)
    with_holes = suggest(make_log(np.insert(norms, slice(0, 1000, 10), np.nan)))
    without = suggest(make_log(norms))
    assert (with_holes.max_norm, with_holes.interval) == (without.max_norm, without.interval)
    assert with_holes.num_nonfinite == 100
    assert with_holes.notes == ("Ignored norms, because they are not finite: 100 of 1,100.",)


@pytest.mark.parametrize(
    ("norms", "excerpt"),
    [
        (steady_norms(199), "steps 1 to 199 have 199 finite norms, and a bound needs 200"),
        (
            np.append(steady_norms(150), [np.nan] * 200),
            "have 150 finite norms (200 norms of the run are not finite), and a bound needs 200. "
            "Record a longer run that stays finite",
        ),
        (np.append(steady_norms(1000), 5 * steady_norms(150)), "have 150 finite norms"),
        (np.full(500, np.nan), "none of 500 norms is finite"),
        (np.zeros(500), "at least 90 % of the norms are 0"),
    ],
)
def test_too_few_norms(norms: Floats, excerpt: str) -> None:
    with pytest.raises(RunError) as caught:
        suggest(make_log(norms))
    assert excerpt in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewest_norms() -> None:
    assert suggest(make_log(steady_norms(200))).num_steps == 200


def test_other_batch_size(tmp_path: Path) -> None:
    log = write_and_read(tmp_path, HEADER, make_lines(steady_norms(300)))
    assert suggest(log).cautions == suggest(log, batch=16).cautions == ()
    (caution,) = suggest(log, batch=64).cautions
    p90 = np.percentile(steady_norms(300), 90)
    assert "batch size 16, not 64" in caution
    assert f"between {p90 / 2:.3g} and {p90:.3g}" in caution
    (unknown,) = suggest(make_log(steady_norms(300)), batch=64).cautions
    assert "does not have its batch size" in unknown


def test_batch_size_that_changed(tmp_path: Path) -> None:
    lines = make_lines(steady_norms(600))
    log = write_and_read(tmp_path, HEADER, lines[:300], HEADER, lines[300:400], {**HEADER, "batch": 32}, lines[400:])
    (caution,) = suggest(log).cautions
    assert "16, then 32 from step 401 on" in caution


def test_dominant_tensor_is_noted(tmp_path: Path) -> None:
    header = {**HEADER, "tensors": ["a", "b", "c"]}
    log = write_and_read(tmp_path, header, make_lines(steady_norms(300), tensor_norms=[1.0, 3.0, 1.0]))
    (note,) = suggest(log).notes
    assert note.startswith("b has 82 % of the squared norm")


def test_interval_contains_the_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 95 % interval contains it for 28.5 of 30 seeds on average."""
    monkeypatch.setattr(suggest_module, "NUM_RESAMPLES", 200)
    intervals = [suggest(make_log(steady_norms(500, seed))).interval for seed in range(30)]
    assert sum(low < math.exp(0.3204) < high for low, high in intervals) >= 25


def test_interval_is_wider_for_correlated_norms() -> None:
    shocks = np.log(steady_norms(1000))
    correlated = shocks.copy()
    for step in range(1, 1000):
        correlated[step] = 0.9 * correlated[step - 1] + math.sqrt(1 - 0.9**2) * shocks[step]
    independent = suggest(make_log(np.exp(shocks))).interval
    wider = suggest(make_log(np.exp(correlated))).interval
    assert wider[1] / wider[0] > (independent[1] / independent[0]) ** 1.5


@given(st.floats(1e-12, 1e12))
def test_round_bound_is_close_and_short(value: float) -> None:
    assert round_bound(value) == pytest.approx(value, rel=0.0251)
    assert len(f"{round_bound(value):g}".strip("0.")) <= 8


@pytest.mark.parametrize(
    ("value", "expected"), [(1.694, 1.69), (0.8194, 0.82), (12.34, 12.3), (2.34, 2.3), (3456, 3500), (0.00999, 0.01)]
)
def test_round_bound(value: float, expected: float) -> None:
    assert round_bound(value) == expected
