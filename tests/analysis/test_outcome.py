"""Outcomes of runs with known losses, and a diagnosis of runs with known causes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.confusion import KINDS, make_run
from distclip.monitor.analysis.diagnosis import diagnose
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import read
from distclip.monitor.analysis.outcome import find_outcome
from distclip.monitor.analysis.suggest import suggest
from tests.logs import Floats, make_log, steady_norms

STEPS = 600


def noisy(losses: Any, scatter: float = 0.1) -> Floats:
    return np.asarray(losses) + scatter * np.random.default_rng(0).normal(size=STEPS)


TIME = np.linspace(0, 1, STEPS)
LEARNING = 1 + 3 * np.exp(-5 * TIME)
FAILING = np.where(TIME < 0.5, LEARNING, 1 + 8 * TIME)
BUMP = LEARNING + 4 * (abs(TIME - 0.6) < 0.05)
GUESS = {"guess": 4.6}

OUTCOMES: dict[str, tuple[Any, dict[str, Any] | None, str]] = {
    "learns": (LEARNING, None, "healthy"),
    "learns, on other data too": (LEARNING, {"held_out": 1.2, **GUESS}, "healthy"),
    "negative losses": (LEARNING - 10, None, "healthy"),
    "flat": (np.full(STEPS, 2.0), None, "healthy"),
    "flat, below a guess": (np.full(STEPS, 2.0), GUESS, "healthy"),
    "flat and noisy": (noisy(np.full(STEPS, 2.0), 1.0), None, "healthy"),
    "rises": (FAILING, None, "diverged"),
    "explodes at once": (np.where(np.arange(STEPS) == 0, 1.4, 9.0), None, "diverged"),
    "learns nothing": (np.full(STEPS, 4.6), GUESS, "diverged"),
    "loses what it has learned": (np.where(TIME < 0.7, LEARNING, 3.6), None, "diverged"),
    "good batches, bad on other data": (LEARNING, {"held_out": 30.0, **GUESS}, "diverged"),
    "held-out loss of NaN": (LEARNING, {"held_out": math.nan, **GUESS}, "diverged"),
    "one bump": (BUMP, None, "recovered"),
    "no losses": (np.full(STEPS, np.nan), None, "unknown"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcome(name: str) -> None:
    losses, summary, verdict = OUTCOMES[name]
    log = make_log(steady_norms(STEPS), columns={"loss": noisy(losses, 0.05)}, summary=summary)
    outcome = find_outcome(log)
    assert outcome.verdict == verdict, outcome.text
    rules = [finding.rule for finding in diagnose(log)]
    assert rules == (["divergence"] if verdict == "diverged" else []), rules
    if verdict == "diverged":
        with pytest.raises(RunError, match="training diverged"):
            suggest(log)
    else:
        cautions = " ".join(suggest(log).cautions)
        assert (outcome.text in cautions) == (verdict == "recovered")


def test_outcome_of_norms_alone() -> None:
    assert find_outcome(make_log([1.0] * 10)).verdict == "unknown"
    assert find_outcome(make_log([*steady_norms(200), *[math.nan] * 50])).verdict == "diverged"
    assert find_outcome(make_log([*steady_norms(200), *[math.nan] * 3])).verdict == "unknown"


def test_suggested_bounds_trigger_no_rule(tmp_path: Path) -> None:
    """Clip stationary runs at the bound that their own norms suggest."""
    for seed in range(40):
        norms = steady_norms(400, seed, 0.1 + 0.02 * seed)
        bound = suggest(make_log(norms)).max_norm
        coefs = np.minimum(1, bound / steady_norms(400, 1000 + seed, 0.1 + 0.02 * seed))
        again = make_log(steady_norms(400, 1000 + seed, 0.1 + 0.02 * seed), coefs=coefs, clipped=coefs < 1)
        assert diagnose(again) == []


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_first_finding_is_the_cause(kind: str, seed: int, tmp_path: Path) -> None:
    findings = diagnose(read(make_run(kind, seed, tmp_path / "run")))
    assert (findings[0].rule if findings else "") == KINDS[kind], findings
