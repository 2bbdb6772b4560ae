"""Rules of a diagnosis: each has a run that triggers only this rule, and ordinary runs trigger none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.diagnosis import Finding, diagnose
from distclip.monitor.analysis.log import read
from distclip.monitor.analysis.spikes import find_spikes
from tests.logs import (
    HEADER,
    Floats,
    make_bad_data_lines,
    make_launched,
    make_lines,
    make_log,
    steady_norms,
    write_and_read,
    write_run,
)

STEPS = 1500
FP16 = {**HEADER, "precision": "fp16"}


def with_values(values: Mapping[int, float], seed: int = 0) -> Floats:
    """Return steady norms with other values at some steps."""
    norms = steady_norms(STEPS, seed)
    for step, value in values.items():
        norms[step - 1] = value
    return norms


def diverging_norms() -> Floats:
    norms = steady_norms(STEPS)
    norms[590:600] = [3, 8, 20, 60, 100, 400, 1e4, 1e6, 1e9, 1e20]
    norms[600:] = math.nan
    return norms


def scaled_lines(falls: Mapping[int, float]) -> list[Any]:
    """Return lines whose loss scale changes by a factor after some steps. A step before a reduction is not finite."""
    scale, scales = 65536.0, [0.0]
    for step in range(1, STEPS + 1):
        scales.append(scale)
        scale *= falls.get(step, 1)
    norms = with_values({step: math.nan for step, factor in falls.items() if factor < 1})
    return make_lines(norms, lambda step: {"scale": scales[step]})


def early_spikes() -> list[Any]:
    return make_lines(with_values({4: 40, 8: 30, 9: 50, 16: 25, 23: 41}))


def culprit_at(step: int) -> dict[str, Any]:
    return {"culprits": [{"name": "0.weight", "nans": 3, "infs": 0, "ranks": [1]}]} if step in (201, 701) else {}


def dominant_tensor(share: float) -> Callable[[int], Mapping[str, Any]]:
    squares = [share, *[(1 - share) / 4] * 4]
    return lambda step: {"tensor_norms": [step * math.sqrt(square) for square in squares]}


NAMES = {"tensors": ["head.weight", "a", "b", "c", "d"]}

TRIGGERS = {
    "divergence": ((HEADER, make_lines(diverging_norms())), ["from step 601 to the end, step 1500", "1e+20"]),
    "bad data": (
        (HEADER, make_bad_data_lines()),
        ["sample 137 is in 57 of them", "load a checkpoint from before step"],
    ),
    "numerics: collapse": (
        (FP16, scaled_lines({300 + 20 * i: 0.5 for i in range(16)})),
        ["from 65536 at step 300 to 1 at step 601, in 16 reductions. The precision is fp16", "bf16"],
    ),
    "numerics: collapse at once": (
        (FP16, scaled_lines(dict.fromkeys(range(5, 25), 0.5))),
        ["from 65536 at step 5 to 0.0625 at step 25, in 20 reductions"],
    ),
    "numerics: non-finite without warning": (
        (HEADER, make_lines(with_values({201: math.nan, 701: math.nan}), culprit_at)),
        ["2 of 1,500", "before steps 201, 701 has a norm of at least 3 times", "0.weight", "The precision is fp32"],
    ),
    "numerics: from the first step": (
        (FP16, make_lines([math.nan] * 100)),
        ["100 of 100", "before step 1 has", "bf16"],
    ),
    "warm-up": (
        (HEADER, early_spikes()),
        ["5 steps stand out", "up to step 23 of 1500", "norm is 50, at step 9", "first 30 steps"],
    ),
    "warm-up: all of the first": (
        (HEADER, make_lines(with_values(dict.fromkeys(range(1, 16), 30)))),
        ["15 steps stand out"],
    ),
    "clip rate": (
        (HEADER, make_lines(steady_norms(STEPS), bound=0.9)),
        ["66 % of 1,500 steps", "under a bound of 0.9, at learning rate 0.1", "in 10 of 10 parts", "suggest"],
    ),
    "clip rate: after a warm-up": (
        (HEADER, make_lines(steady_norms(STEPS) / (1 + 20 * np.exp(-np.arange(STEPS) / 60)), bound=0.9)),
        ["steps after the warm-up (step"],
    ),
    "dominant tensor": (
        ({**HEADER, **NAMES}, make_lines(steady_norms(300), dominant_tensor(0.75))),
        ["head.weight has 75 %", "5 tensors"],
    ),
}

CLEAN = {
    "steady": (HEADER, make_lines(steady_norms(STEPS), bound=2.0)),
    "without a header": (make_lines(steady_norms(STEPS)),),
    "two lines": (make_lines([1.0, 40.0]),),
    "wide scatter": (HEADER, make_lines(steady_norms(STEPS, scatter=0.8), bound=12)),
    "large gradients after the initialisation": (
        HEADER,
        make_lines(steady_norms(STEPS) * (1 + 8 * np.exp(-np.arange(STEPS) / 30))),
    ),
    "clipped at the beginning only": (
        HEADER,
        make_lines(steady_norms(STEPS) * np.where(np.arange(STEPS) < 250, 9, 1), bound=4.0),
    ),
    "clipped for a while only": (
        HEADER,
        make_lines(steady_norms(STEPS) * np.where(abs(np.arange(STEPS) - 900) < 200, 9, 1), bound=4.0),
    ),
    "occasional spikes": (HEADER, make_lines(with_values(dict.fromkeys(range(60, 1500, 120), 20.0)))),
    "a spike before an overflow": (HEADER, make_lines(with_values({500: 50.0, 503: math.nan}))),
    "a scaler that searches for its scale": (FP16, scaled_lines({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5})),
    "a scaler that tries larger scales": (
        FP16,
        scaled_lines({400: 2.0, 410: 0.5, 800: 2.0, 805: 0.5, 1200: 2.0, 1500: 0.5}),
    ),
    "a little more than half of the squared norm in one tensor": (
        {**HEADER, **NAMES},
        make_lines(steady_norms(300), dominant_tensor(0.6)),
    ),
    "most of the squared norm in one tensor, which has its own bound": (
        {**HEADER, **NAMES, "per": "tensor"},
        make_lines(steady_norms(300), dominant_tensor(0.9)),
    ),
    "two tensors, one of them larger": (
        {**HEADER, "tensors": ["a", "b"]},
        make_lines(steady_norms(300), tensor_norms=[1.0, 9.0]),
    ),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_rule_finds_its_problem(name: str, tmp_path: Path) -> None:
    parts, excerpts = TRIGGERS[name]
    findings = diagnose(write_and_read(tmp_path, *parts))
    assert [finding.rule for finding in findings] == [name.partition(":")[0]]
    (finding,) = findings
    text = f"{finding.title} {finding.evidence} {finding.advice}"
    assert all(excerpt in text for excerpt in excerpts), text


@pytest.mark.parametrize("name", CLEAN)
def test_clean_run_has_no_findings(name: str, tmp_path: Path) -> None:
    assert diagnose(write_and_read(tmp_path, *CLEAN[name])) == []


def test_several_rules_find_problems(tmp_path: Path) -> None:
    lines = make_lines(with_values({900: math.nan}), dominant_tensor(0.8), bound=0.9)
    rules = {finding.rule for finding in diagnose(write_and_read(tmp_path, {**HEADER, **NAMES}, lines))}
    assert rules == {"numerics", "clip rate", "dominant tensor"}


def test_nonfinite_bad_samples_are_not_a_numerics_problem(tmp_path: Path) -> None:
    lines = make_bad_data_lines()
    for line in lines:
        if line.get("spike", 0) > 3:
            line.update(norm=None, spike=None, coef=None, clipped=False, finite=False, skipped=True)
    (finding,) = diagnose(read(make_launched(write_run(tmp_path, HEADER, lines))))
    assert finding.rule == "bad data"
    assert "137" in finding.title
    assert finding.command.startswith("python launch/train.py resume=")
    assert finding.advice.endswith(finding.command)


def test_widely_scattered_norms_have_no_spikes() -> None:
    assert find_spikes(steady_norms(STEPS, scatter=0.8)).tolist() == []
    assert find_spikes(with_values({1: 40, 700: 3.5, 1500: 9}) / steady_norms(STEPS) ** 0.9).tolist() == [0, 699, 1499]


def test_fields_of_a_finding_are_text() -> None:
    (finding,) = diagnose(make_log(with_values({3: math.nan})))
    assert isinstance(finding, Finding)
    assert all(isinstance(text, str) for text in (finding.rule, finding.title, finding.evidence, finding.advice))


@pytest.mark.parametrize("norms", [[], [math.nan], [0.0] * 300, [math.nan] * 300, [1e-300, 1e300] * 200])
def test_degenerate_norms(norms: list[float]) -> None:
    assert len(diagnose(make_log(norms))) <= 1
