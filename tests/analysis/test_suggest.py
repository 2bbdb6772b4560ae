"""Bounds suggested for norms whose percentiles are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distclip
from distclip.monitor.analysis import threshold
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.threshold import rounded, suggest
from tests.analysis.by_hand import HEADER, log_of, recorded, rows, usual


def test_a_steady_run() -> None:
    norms = usual(4000)
    found = suggest(log_of(norms))
    p75, p90, p95 = np.percentile(norms, [75, 90, 95])
    assert found.max_norm == pytest.approx(p90, rel=0.025) and (found.low, found.high) == (p75, p95)
    # Of a log-normal of scatter 0.25: exp(0.25 · 1.2816).
    assert found.interval[0] < math.exp(0.3204) < found.interval[1] < 1.1 * found.interval[0]
    assert found.max_norm == 1.38 and found.override == "clip=global_norm clip.max_norm=1.38"
    assert found.python == "distclip.GradClipper(model, distclip.global_norm(1.38))"
    assert (found.steps, found.dropped, found.cap, found.current) == (4000, 0, None, None)
    assert found.notes == () and found.cautions == ()
    assert "Clip at 1.38" in found.text and "steps 1 to 4000" in found.text and "p75 to p95" in found.text
    assert suggest(log_of(norms)) == found


def test_the_python_line_is_python() -> None:
    namespace = {"distclip": distclip, "model": torch.nn.Linear(2, 2)}
    for norms in (usual(400), usual(1500) * 4 ** (np.arange(1500) / 1500)):
        assert isinstance(eval(suggest(log_of(norms)).python, namespace), distclip.GradClipper)


def test_candidates() -> None:
    """1 … 1.5, of which the largest fifth of each hundred come in a row."""
    generator = np.random.default_rng(0)
    values = np.linspace(1, 1.5, 1001)[1:].reshape(5, 200)
    # Each 200 of the run have every fifth value, the largest 20 last.
    norms = np.concatenate(
        [np.append(generator.permutation(each[:-20]), each[-20:]) for each in values.T.reshape(5, 200, order="F")]
    )
    found = {each.name: each for each in suggest(log_of(norms)).candidates}
    rates = {name: round(each.clip_rate, 3) for name, each in found.items()}
    assert rates == {"p50": 0.5, "p75": 0.25, "p90": 0.1, "p95": 0.05, "p99": 0.01, "max": 0.0}
    assert (found["p90"].longest, found["p99"].longest, found["max"].longest) == (20, 2, 0)
    expected = np.minimum(1, found["p75"].bound / norms).mean()
    assert found["p75"].mean_coef == pytest.approx(expected, rel=1e-12) and found["max"].mean_coef == 1
    assert [found[name].role for name in ("p75", "p99", "max")] == ["limiter", "safety net", "inactive"]


@pytest.mark.parametrize(
    ("bound", "role"), [(100.0, "inactive"), (1.6, "safety net"), (1.2, "limiter"), (0.5, "normaliser")]
)
def test_the_bound_in_use(bound: float, role: str, tmp_path: Path) -> None:
    norms = usual(1000)
    found = suggest(recorded(tmp_path, HEADER, rows(norms, bound=bound)))
    assert found.current is not None and (found.current.bound, found.current.role) == (bound, role)
    assert found.current.clip_rate == (norms > bound).mean()
    assert any("were clipped" in each for each in found.cautions) == (role in ("limiter", "normaliser"))


def test_a_bound_that_the_log_does_not_name(tmp_path: Path) -> None:
    lines = [{key: line[key] for key in ("step", "norm", "coef")} for line in rows(usual(300), bound=1.2)]
    current = suggest(recorded(tmp_path / "fixed", lines)).current
    assert current is not None and current.bound == pytest.approx(1.2) and current.role == "limiter"
    for line in lines:
        line["coef"] **= 2
    current = suggest(recorded(tmp_path / "varies", lines)).current
    assert current is not None and math.isnan(current.bound) and current.role == "limiter"


def test_the_last_regime_counts() -> None:
    norms = np.concatenate([10 * usual(100), usual(500, 1), 1.8 * usual(400, 2)])
    found = suggest(log_of(norms))
    assert abs(found.segment.first - 601) <= 20 and found.max_norm == pytest.approx(1.8 * 1.38, rel=0.08)
    warm_up, change = found.notes
    assert "Warm-up to step 100" in warm_up and "At step 60" in change and "the last regime" in found.text
    assert found.cap is None


def test_norms_that_drift_want_an_adaptive_policy() -> None:
    for drift in (4 ** (np.arange(2000) / 2000), 4 ** (1 - np.arange(2000) / 2000)):
        norms = usual(2000) * drift
        found = suggest(log_of(norms))
        assert found.drift > 2 and found.cap is not None
        assert np.percentile(norms, 90) < found.cap < norms.max()
        assert found.override == f"clip=median_mad clip.cap={found.cap:g}"
        assert found.python == f"distclip.GradClipper(model, distclip.median_mad(3, cap={found.cap:g}))"
        assert any("adaptive" in each for each in found.cautions)
    assert suggest(log_of(usual(2000) * 1.8 ** (np.arange(2000) / 2000))).cap is None


def test_norms_that_are_not_finite_are_left_out() -> None:
    norms = usual(1000)
    holes = np.insert(norms, slice(0, 1000, 10), np.nan)
    found = suggest(log_of(holes))
    assert (found.max_norm, found.interval) == (suggest(log_of(norms)).max_norm, suggest(log_of(norms)).interval)
    assert found.dropped == 100 and found.notes == (
        "100 of 1,100 steps were left out because their norms are not finite.",
    )


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        (usual(199), "steps 1 to 199 have 199 finite norms, and a bound needs 200"),
        (
            np.append(usual(150), [np.nan] * 200),
            "have 150 finite norms (200 of the run are not finite), and a bound needs 200: "
            "record a longer run that stays finite",
        ),
        (np.append(usual(1000), 5 * usual(150)), "have 150 finite norms"),
        (np.full(500, np.nan), "not one of 500 norms is finite"),
        (np.zeros(500), "nine of ten norms are 0"),
    ],
)
def test_too_little_to_go_by(norms: np.ndarray, words: str) -> None:
    with pytest.raises(RunError) as caught:
        suggest(log_of(norms))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert suggest(log_of(usual(200))).steps == 200


def test_another_batch_size(tmp_path: Path) -> None:
    log = recorded(tmp_path, HEADER, rows(usual(300)))
    assert suggest(log).cautions == suggest(log, batch=16).cautions == ()
    (caution,) = suggest(log, batch=64).cautions
    p90 = np.percentile(usual(300), 90)
    assert "batch 16, not 64" in caution and f"between {p90 / 2:.3g} and {p90:.3g}" in caution
    (unknown,) = suggest(log_of(usual(300)), batch=64).cautions
    assert "does not say its batch size" in unknown


def test_a_batch_size_that_changed(tmp_path: Path) -> None:
    lines = rows(usual(600))
    log = recorded(tmp_path, HEADER, lines[:300], HEADER, lines[300:400], {**HEADER, "batch": 32}, lines[400:])
    (caution,) = suggest(log).cautions
    assert "16, then 32 from step 401 on" in caution


def test_a_tensor_that_is_most_of_it(tmp_path: Path) -> None:
    header = {**HEADER, "tensors": ["a", "b", "c"]}
    log = recorded(tmp_path, header, rows(usual(300), tensor_norms=[1.0, 3.0, 1.0]))
    (note,) = suggest(log).notes
    assert note.startswith("b carries 82 % of the squared norm")


def test_the_interval_holds_the_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    """On most of 30 seeds; 95 % of them are 28.5."""
    monkeypatch.setattr(threshold, "RESAMPLES", 200)
    found = [suggest(log_of(usual(500, seed))).interval for seed in range(30)]
    assert sum(low < math.exp(0.3204) < high for low, high in found) >= 25


def test_the_interval_is_wider_where_neighbours_are_alike() -> None:
    shocks = np.log(usual(1000))
    alike = shocks.copy()
    for step in range(1, 1000):
        alike[step] = 0.9 * alike[step - 1] + math.sqrt(1 - 0.9**2) * shocks[step]
    (low, high), (wider_low, wider_high) = (suggest(log_of(np.exp(each))).interval for each in (shocks, alike))
    assert wider_high / wider_low > (high / low) ** 1.5


@given(st.floats(1e-12, 1e12))
def test_rounded(value: float) -> None:
    assert rounded(value) == pytest.approx(value, rel=0.0251) and len(f"{rounded(value):g}".strip("0.")) <= 8


@pytest.mark.parametrize(
    ("value", "expected"), [(1.694, 1.69), (0.8194, 0.82), (12.34, 12.3), (2.34, 2.3), (3456, 3500), (0.00999, 0.01)]
)
def test_rounded_to_what_one_would_write(value: float, expected: float) -> None:
    assert rounded(value) == expected
