"""Each rule has a run that triggers it, and nothing but it; ordinary runs trigger none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distclip.monitor.analysis.diagnosis import Finding, diagnose
from distclip.monitor.analysis.excess import spikes_of
from tests.analysis.by_hand import HEADER, Floats, bad_record, log_of, recorded, rows, usual

STEPS = 1500
FP16 = {**HEADER, "precision": "fp16"}


def at(values: Mapping[int, float], seed: int = 0) -> Floats:
    """Usual norms, with others at some steps."""
    norms = usual(STEPS, seed)
    for step, value in values.items():
        norms[step - 1] = value
    return norms


def diverging() -> Floats:
    norms = usual(STEPS)
    norms[590:600] = [3, 8, 20, 60, 100, 400, 1e4, 1e6, 1e9, 1e20]
    norms[600:] = math.nan
    return norms


def scaled(falls: Mapping[int, float]) -> list[Any]:
    """A loss scale that changes after some steps by a factor; where it falls, the step is not finite."""
    scale, scales = 65536.0, [0.0]
    for step in range(1, STEPS + 1):
        scales.append(scale)
        scale *= falls.get(step, 1)
    norms = at({step: math.nan for step, factor in falls.items() if factor < 1})
    return rows(norms, lambda step: {"scale": scales[step]})


def early() -> list[Any]:
    return rows(at({4: 40, 8: 30, 9: 50, 16: 25, 23: 41}))


def culprit(step: int) -> dict[str, Any]:
    return {"culprits": [{"name": "0.weight", "nans": 3, "infs": 0, "ranks": [1]}]} if step in (201, 701) else {}


def dominated(share: float) -> Callable[[int], Mapping[str, Any]]:
    squares = [share, *[(1 - share) / 4] * 4]
    return lambda step: {"tensor_norms": [step * math.sqrt(each) for each in squares]}


NAMES = {"tensors": ["head.weight", "a", "b", "c", "d"]}

TRIGGERS = {
    "divergence": ((HEADER, rows(diverging())), ["from step 601 to the end, step 1500", "1e+20"]),
    "bad data": ((HEADER, bad_record()), ["sample 137 is in 57 of them", "replay="]),
    "numerics: collapse": (
        (FP16, scaled({300 + 20 * i: 0.5 for i in range(16)})),
        ["from 65536 at step 300 to 1 at step 601, in 16 falls; precision fp16", "bf16"],
    ),
    "numerics: collapse at once": (
        (FP16, scaled(dict.fromkeys(range(5, 25), 0.5))),
        ["from 65536 at step 5 to 0.0625 at step 25, in 20 falls"],
    ),
    "numerics: out of nothing": (
        (HEADER, rows(at({201: math.nan, 701: math.nan}), culprit)),
        ["2 of 1,500 steps", "before steps 201, 701 have no norm", "0.weight", "precision fp32"],
    ),
    "numerics: from the first step": (
        (FP16, rows([math.nan] * 100)),
        ["100 of 100 steps", "before step 1 have", "bf16"],
    ),
    "warm-up": (
        (HEADER, early()),
        ["5 steps stand out", "up to step 23 of 1500", "norm is 50, at step 9", "first 30 steps"],
    ),
    "warm-up: all of the first": ((HEADER, rows(at(dict.fromkeys(range(1, 16), 30)))), ["15 steps stand out"]),
    "clip rate": (
        (HEADER, rows(usual(STEPS), bound=1.2)),
        ["23 % of 1,500 steps", "under a bound of 1.2, at learning rate 0.1", "in 10 of 10 parts", "suggest"],
    ),
    "clip rate: after a warm-up": (
        (HEADER, rows(usual(STEPS) / (1 + 20 * np.exp(-np.arange(STEPS) / 60)), bound=1.2)),
        ["steps after the warm-up (step"],
    ),
    "dominant tensor": (
        ({**HEADER, **NAMES}, rows(usual(300), dominated(0.6))),
        ["head.weight carries 60 %", "5 tensors"],
    ),
}

CLEAN = {
    "usual": (HEADER, rows(usual(STEPS), bound=2.0)),
    "without a header": (rows(usual(STEPS)),),
    "two lines": (rows([1.0, 40.0]),),
    "wide scatter": (HEADER, rows(usual(STEPS, scatter=0.8), bound=12)),
    "large gradients at the initialisation": (HEADER, rows(usual(STEPS) * (1 + 8 * np.exp(-np.arange(STEPS) / 30)))),
    "clipped at the beginning only": (
        HEADER,
        rows(usual(STEPS) * np.where(np.arange(STEPS) < 250, 9, 1), bound=4.0),
    ),
    "clipped for a while only": (
        HEADER,
        rows(usual(STEPS) * np.where(abs(np.arange(STEPS) - 900) < 200, 9, 1), bound=4.0),
    ),
    "spikes now and then": (HEADER, rows(at(dict.fromkeys(range(60, 1500, 120), 20.0)))),
    "a spike and then an overflow": (HEADER, rows(at({500: 50.0, 503: math.nan}))),
    "a scaler that looks for its scale": (FP16, scaled({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5})),
    "a scaler that tries a larger one": (FP16, scaled({400: 2.0, 410: 0.5, 800: 2.0, 805: 0.5, 1200: 2.0, 1500: 0.5})),
    "half of it in one tensor": ({**HEADER, **NAMES}, rows(usual(300), dominated(0.49))),
    "of two tensors one is larger": (
        {**HEADER, "tensors": ["a", "b"]},
        rows(usual(300), tensor_norms=[1.0, 9.0]),
    ),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_rule(name: str, tmp_path: Path) -> None:
    parts, words = TRIGGERS[name]
    findings = diagnose(recorded(tmp_path, *parts))
    assert [each.rule for each in findings] == [name.partition(":")[0]]
    (finding,) = findings
    text = f"{finding.title} {finding.evidence} {finding.advice}"
    assert all(word in text for word in words), text


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_run(name: str, tmp_path: Path) -> None:
    assert diagnose(recorded(tmp_path, *CLEAN[name])) == []


def test_rules_add_up(tmp_path: Path) -> None:
    lines = rows(at({4: 40, 8: 30, 9: 50, 16: 25, 900: math.nan}), dominated(0.8), bound=1.1)
    found = {each.rule for each in diagnose(recorded(tmp_path, {**HEADER, **NAMES}, lines))}
    assert found == {"warm-up", "numerics", "clip rate", "dominant tensor"}


def test_bad_samples_that_are_not_finite_are_no_numerics(tmp_path: Path) -> None:
    lines = bad_record()
    for line in lines:
        if line.get("spike", 0) > 3:
            line.update(norm=None, spike=None, coef=None, clipped=False, finite=False, skipped=True)
    (finding,) = diagnose(recorded(tmp_path, HEADER, lines))
    assert finding.rule == "bad data" and "137" in finding.title
    assert finding.command.startswith("launch/train.py resume=") and finding.advice.endswith(finding.command)


def test_norms_that_scatter_widely_have_no_spikes() -> None:
    assert spikes_of(log_of(usual(STEPS, scatter=0.8))).tolist() == []
    assert spikes_of(log_of(at({1: 40, 700: 3.5, 1500: 9}) / usual(STEPS) ** 0.9)).tolist() == [0, 699, 1499]


def test_a_finding_is_words() -> None:
    (finding,) = diagnose(log_of(at({3: math.nan})))
    assert isinstance(finding, Finding)
    assert all(isinstance(getattr(finding, name), str) for name in ("rule", "title", "evidence", "advice"))


@pytest.mark.parametrize("norms", [[], [math.nan], [0.0] * 300, [math.nan] * 300, [1e-300, 1e300] * 200])
def test_strange_norms(norms: list[float]) -> None:
    assert len(diagnose(log_of(norms))) <= 1
