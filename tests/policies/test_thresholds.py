"""Compare every rule with its twin in `reference`, for any norms in any number of slots, with non-finite steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distclip
from distclip import reference
from distclip.errors import ArgumentError
from distclip.norms.reduce import Totals
from distclip.policies import (
    EMA,
    AdaGC,
    Fixed,
    MedianMAD,
    NormPolicy,
    Percentile,
    RelativeToWeight,
    State,
    ZScore,
    adagc,
    agc,
    aggc,
    autoclip,
    ema,
    global_norm,
    group_norm,
    per_tensor_norm,
    restart,
    zclip,
)
from distclip.policies.history import append, quantile
from tests.policies.norms import many, totals, traces
from tests.tables.policies import ADAPTIVE, POLICIES, VARIANTS, Variant

CPU = torch.device("cpu")


def run(policy: NormPolicy, trace: Sequence[Sequence[float]]) -> Iterator[tuple[list[float], State, State]]:
    """Yield (coefs, state before, state after) of every step."""
    state = policy.init(len(trace[0]), CPU)
    for norms in trace:
        verdict, after = policy.decide(totals(norms), state)
        yield verdict.coefs.tolist(), state, after
        state = after


def coefs(policy: NormPolicy, trace: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the coefficients of every step."""
    return [coef for coef, _, _ in run(policy, trace)]


def equal_states(state: State, other: State) -> bool:
    """Return whether two states are equal bit by bit."""
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def expected_coefs(variant: Variant, trace: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the coefficients by the twin, which sees one slot at a time, and NaN where it sees no norm."""
    expected = [[nan] * len(trace[0]) for _ in trace]
    total_norms = [math.sqrt(math.fsum(n * n for n in norms)) for norms in trace]
    for slot in range(len(trace[0])):
        steps = [t for t, norms in enumerate(trace) if all(map(math.isfinite, norms)) and norms[slot] > 0]
        bounds = variant.twin([trace[t][slot] for t in steps], [total_norms[t] for t in steps])
        for t, bound in zip(steps, bounds, strict=True):
            expected[t][slot] = min(1.0, bound / trace[t][slot])
    return expected


each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
@many
@given(trace=traces())
def test_rule_equals_its_twin(variant: Variant, trace: list[list[float]]) -> None:
    """Compare slot by slot. The twin sees no step that is not finite, and no zero of its slot."""
    rows = coefs(NormPolicy(variant.threshold, restart_after=0), trace)
    for t, (row, expected) in enumerate(zip(rows, expected_coefs(variant, trace), strict=True)):
        for slot, (coef, bound) in enumerate(zip(row, expected, strict=True)):
            if not math.isnan(bound):
                assert math.isclose(coef, bound, rel_tol=1e-7), f"step {t}, slot {slot}: {coef}, not {bound}"


@pytest.mark.parametrize("window", [0, 10])
@each_variant
@many
@given(trace=traces())
def test_nonfinite_steps_and_zeros_leave_no_trace(variant: Variant, window: int, trace: list[list[float]]) -> None:
    """Compare states before and after: of all slots at a non-finite step, of one slot at its zero."""
    for (_, norms), (row, before, after) in zip(
        enumerate(trace), run(NormPolicy(variant.threshold, restart_after=window), trace), strict=True
    ):
        finite = all(map(math.isfinite, norms))
        assert finite or equal_states(before, after)
        for slot, norm in enumerate(norms):
            if norm == 0:
                assert all(torch.equal(before[key][slot], after[key][slot]) for key in before)
                assert not finite or 0 <= row[slot] <= 1
        assert not any(value.isnan().any() for value in after.values())


@each_variant
@settings(many, max_examples=10)
@given(trace=traces())
def test_rule_is_a_pure_function(variant: Variant, trace: list[list[float]]) -> None:
    """Decide twice on equal inputs, which must not change. The first dim of every state is the slot."""
    policy = NormPolicy(variant.threshold, restart_after=4)
    for norms, (row, before, after) in zip(trace, run(policy, trace), strict=True):
        copy = {key: value.clone() for key, value in before.items()}
        numbers = totals(norms)
        bound, _ = variant.threshold(numbers, before)
        again, next_state = policy.decide(numbers, before)
        assert equal_states(before, copy)
        assert equal_states(next_state, after)
        assert np.array_equal(again.coefs.tolist(), row, equal_nan=True)
        assert bound.dtype == torch.float64
        assert all(value.shape[0] == len(norms) and value.dtype == before[key].dtype for key, value in after.items())


@each_variant
def test_rule_needs_no_host_sync(variant: Variant) -> None:
    """Decide on meta tensors, which have no values to read."""
    meta = torch.device("meta")
    policy = NormPolicy(variant.threshold)
    state = policy.init(3, meta)
    value = torch.ones(3, dtype=torch.float64, device=meta)
    verdict, after = policy.decide(Totals(value), state)
    assert verdict.coefs.shape == (3,)
    assert {key: (v.shape, v.dtype) for key, v in after.items()} == {
        key: (v.shape, v.dtype) for key, v in state.items()
    }


@each_variant
def test_slots_are_independent(variant: Variant) -> None:
    """Run slots one by one and together, which gives the same bits if no bound is on the total norm."""
    threshold = (
        replace(variant.threshold, warmup_norm=inf) if isinstance(variant.threshold, AdaGC) else variant.threshold
    )
    rng = np.random.default_rng(0)
    norms = np.exp(0.5 * rng.standard_normal((60, 5))) * [1, 1e-3, 1e3, 1, 1]
    norms[20:, 1] *= 10
    norms[30, 2] *= 100
    norms[:25, 3] = 0
    together = np.array(coefs(NormPolicy(threshold), norms.tolist()))
    for slot in range(5):
        alone = np.array(coefs(NormPolicy(threshold), norms[:, [slot]].tolist()))
        assert np.array_equal(alone[:, 0], together[:, slot])


@many
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(1, 8), st.floats(0, 1))
def test_quantile_equals_numpy(values: list[float], window: int, q: float) -> None:
    """Take quantiles of the last `window` values of one of two slots."""
    history = torch.zeros(2, window, dtype=torch.float64)
    count = torch.tensor([0, 0])
    for i, value in enumerate(values):
        history = append(history, count, torch.tensor([value, -inf], dtype=torch.float64))
        count = count + 1
        result = quantile(history, count, q)[0].item()
        expected = np.quantile(values[max(0, i + 1 - window) : i + 1], q)
        assert math.isclose(result, expected, rel_tol=1e-12, abs_tol=1e-9)


@many
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0, 100), st.integers(1, 40))
def test_twin_of_autoclip_equals_numpy(norms: list[float], p: float, window: int) -> None:
    expected = [np.percentile(norms[max(0, t + 1 - window) : t + 1], p) for t in range(len(norms))]
    assert np.allclose(reference.autoclip_bounds(norms, p, window), expected, rtol=1e-9, atol=0)


CAPPED = {name: row.capped() for name, row in POLICIES.items() if row.capped is not None}


@pytest.mark.parametrize("policy", CAPPED.values(), ids=CAPPED.keys())
def test_cap_holds_from_the_first_step(policy: NormPolicy) -> None:
    """Cap spikes from the first step on, which the rule must not learn: norms of 1 are never clipped."""
    trace = [[1000.0, 1.0]] * 2 + [[1.0, 1.0]] * 40 + [[1000.0, 1.0]] + [[1.0, 1.0]] * 10
    for norms, row in zip(trace, coefs(policy, trace), strict=True):
        assert row[0] * norms[0] <= 2.0
        assert row[1] == pytest.approx(1, abs=1e-5)
        assert norms[0] > 1 or row[0] == pytest.approx(1, abs=1e-5)


def test_clipping_by_the_cap_restarts_no_rule() -> None:
    """Take norms that stay above the cap, which is no reason to restart."""
    *_, (row, _, state) = run(zclip(cap=2.0, restart_after=16), [[10.0]] * 100)
    assert row[0] == pytest.approx(0.2)
    assert state["restarts"].item() == 0


def shifted(factor: float, steps: int = 300, slots: int = 1) -> list[list[float]]:
    """Return norms that scatter by 5 % around 1, and from step 100 on around `factor`."""
    norms = np.exp(0.05 * np.random.default_rng(1).standard_normal((steps, slots)))
    norms[100:] *= factor
    return norms.tolist()  # type: ignore[no-any-return]


RESTARTING = {"zclip": zclip, "ema": ema}
"""Presets that restart by default. AdaGC clips most steps of a healthy run, so its default is off."""


@pytest.mark.parametrize("preset", RESTARTING.values(), ids=RESTARTING.keys())
def test_rule_restarts_at_a_new_level(preset: Callable[..., NormPolicy]) -> None:
    """Raise the norms of one of two slots tenfold, which restarts that slot only."""
    trace = [[a, b] for (a,), (b,) in zip(shifted(10.0), shifted(1.0), strict=True)]
    *_, (row, _, state) = run(preset(), trace)
    assert row == [1, 1]
    assert state["restarts"].tolist() == [1, 0]
    stuck = coefs(preset(restart_after=0), trace[:200])[-1]
    assert stuck[0] < 0.5
    assert stuck[1] == 1
    assert "restarts" not in preset(restart_after=0).init(2, CPU)


def test_zclip_without_restart_clips_every_step_at_a_new_level() -> None:
    assert np.array(coefs(zclip(restart_after=0), shifted(10.0, 2000)))[-500:].max() < 0.15


def test_rule_restarts_at_each_new_level() -> None:
    """Raise the norms twice, which restarts the rule twice, each time after a window."""
    trace = shifted(10.0) + [[100 * norm for (norm,) in [row]] for row in shifted(1.0)]
    restarts = [int(state["restarts"]) for _, _, state in run(zclip(), trace)]
    assert restarts[-1] == 2
    # It restarts after half of 128 steps were clipped.
    assert restarts.index(1) == pytest.approx(100 + 64, abs=3)


def test_restart_uses_the_raw_window_up_to_the_cap() -> None:
    """Restart from mean and variance of the raw norms, no higher than the cap, without a second warm-up."""
    norms = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 100.0]], dtype=torch.float64)
    for threshold in (ZScore(cap=10.0, warmup=30), EMA(cap=10.0, warmup=30)):
        seeded = threshold.restart(norms, threshold.init(2, CPU))
        assert seeded["count"].tolist() == [30, 30]
        mean = seeded["mean" if isinstance(threshold, ZScore) else "slow"]
        torch.testing.assert_close(mean, torch.tensor([3.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(
        ZScore(cap=10.0).restart(norms, ZScore().init(2, CPU))["var"], torch.tensor([14 / 3, 8.0], dtype=torch.float64)
    )
    assert torch.equal(seeded["slow"], seeded["fast"])
    state = {"gamma": torch.tensor([7.0, 7.0], dtype=torch.float64), "count": torch.tensor([102, 103])}
    # The window of the first slot still has a norm of the warm-up.
    assert AdaGC(cap=10.0).restart(norms, state)["gamma"].tolist() == [7.0, 6.0]


@pytest.mark.parametrize("rule", [Percentile(), MedianMAD()], ids=["percentile", "mad"])
def test_rules_with_a_history_of_raw_norms_keep_no_second_one(rule: Percentile | MedianMAD) -> None:
    assert not set(restart.KEYS) & set(NormPolicy(rule).init(1, CPU))


def test_warmup_of_adagc_clips_the_total_norm() -> None:
    """Clip all slots by one coefficient. A slot whose norms begin later has a later warm-up."""
    policy = adagc(warmup=3, warmup_norm=1.0)
    late = [[3.0, 4.0, 0.0]] * 5 + [[3.0, 4.0, 12.0]] * 5
    rows = coefs(policy, late)
    for row in rows[:3]:
        assert row[:2] == pytest.approx([0.2, 0.2], rel=1e-6)
    for row in rows[5:8]:
        assert row[2] == pytest.approx(1 / 13, rel=1e-6)
    assert rows[4][0] == pytest.approx(0.208, rel=1e-2)
    assert rows[9][2] == pytest.approx(1.04 / 13, rel=1e-2)


def test_agc_equals_its_twin_for_every_row() -> None:
    """Bound rows relative to their weights. Rows of zeros have a bound above zero."""
    weights, norms = [2.0, 0.0, 100.0, 5.0], [1.0, 1.0, 1.0, 0.0]
    policy = agc(0.01)
    assert policy.spec.needs_weights
    assert policy.init(4, CPU) == {}
    verdict, _ = policy.decide(totals(norms, weights), {})
    expected = [min(1.0, reference.agc_bound(w) / n) if n else 1.0 for w, n in zip(weights, norms, strict=True)]
    assert verdict.coefs.tolist() == pytest.approx(expected, rel=1e-12)
    assert verdict.coefs.tolist() == pytest.approx([0.02, 1e-5, 1.0, 1.0])
    assert not any(p.spec.needs_weights for p in (global_norm(), autoclip(), zclip()))


def test_each_group_has_its_bound() -> None:
    """Pass one norm per group, in the order of the groups, and one for the remaining parameters."""
    groups = {"embedding": {"pattern": "embed", "max_norm": 1.0}, "head": ("head", "inf")}
    policy = group_norm(groups, max_norm=2.0)
    assert policy.per == "group"
    assert policy.groups == {"embedding": "embed", "head": "head"}
    verdict, _ = policy.decide(totals([4.0, 4.0, 4.0]), {})
    assert verdict.coefs.tolist() == pytest.approx([0.25, 1.0, 0.5], rel=1e-6)


def test_per_tensor_norm_clips_exactly_to_the_bound() -> None:
    """Clip without epsilon, as Keras' clipnorm does."""
    verdict, _ = per_tensor_norm(0.5).decide(totals([1.0, 0.5, 0.0]), {})
    assert verdict.coefs.tolist() == [0.5, 1.0, 1.0]


BAD: list[tuple[Callable[..., object], dict[str, Any]]] = [
    *((Percentile, {"p": p}) for p in (-1, 100.5, nan, "ten", None)),
    *((rule, {"cap": -1}) for rule in (Percentile, ZScore, EMA, AdaGC, MedianMAD)),
    *((rule, {"cap": nan}) for rule in (Percentile, ZScore, EMA, AdaGC, MedianMAD)),
    *((rule, {"window": w}) for rule in (Percentile, MedianMAD) for w in (0, 1.5, inf)),
    *((rule, {"warmup": w}) for rule in (ZScore, EMA, AdaGC, MedianMAD) for w in (0, -3, 2.5)),
    *((rule, {"decay": d}) for rule in (ZScore, AdaGC) for d in (1, -0.1, nan)),
    *((rule, {"eps": 0}) for rule in (ZScore, RelativeToWeight)),
    *((rule, {"ratio": 0}) for rule in (EMA, AdaGC, RelativeToWeight)),
    *((EMA, {name: 1.0}) for name in ("slow", "fast")),
    (EMA, {"target": -1}),
    (AdaGC, {"warmup_norm": 0}),
    (NormPolicy, {"eps": -1}),
    (ZScore, {"z": 0}),
    (MedianMAD, {"k": -1}),
    (MedianMAD, {"floor": -0.1}),
    (Fixed, {"max_norm": [1.0, -1.0]}),
]


@pytest.mark.parametrize(("rule", "passed"), BAD, ids=[f"{rule.__name__} {passed}" for rule, passed in BAD])
def test_invalid_arguments_raise(rule: Callable[..., object], passed: dict[str, Any]) -> None:
    """Raise with the argument, its value and what to pass instead."""
    with pytest.raises(ArgumentError, match=r"Use") as raised:
        rule(**passed)
    (name, value), *_ = passed.items()
    assert f"{name}={value!r}" in str(raised.value)


@pytest.mark.parametrize(
    "groups",
    [
        {"a": "embed"},
        {"a": ("embed",)},
        {"a": {"pattern": "embed"}},
        {"a": (1.0, "embed")},
        {"a": ("embed", -1.0)},
        {"a": "ab"},
        {},
    ],
    ids=str,
)
def test_incomplete_groups_raise(groups: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        group_norm(groups)


def test_takes_numbers_as_strings() -> None:
    """Pass strings, as configuration files do."""
    assert zclip("2.5", cap="inf", warmup="25") == zclip()
    assert Percentile("10", cap="1e3") == Percentile(10, cap=1000)
    assert isinstance(autoclip(window="50").threshold.window, int)


@pytest.mark.parametrize("preset", [getattr(distclip, name) for name in ADAPTIVE], ids=ADAPTIVE.keys())
def test_preset_has_the_defaults_of_its_rule(preset: Callable[..., NormPolicy]) -> None:
    """Compare defaults, and pass arguments of the policy through the preset."""
    policy = preset(norm_type="inf", per="row", cap=3.0)
    assert (policy.norm_type, policy.per, policy.threshold.cap) == (inf, "row", 3.0)
    assert preset().per == ("tensor" if preset in (adagc, aggc) else "model")
    assert preset().threshold == type(preset().threshold)()
    assert all(getattr(preset().threshold, f.name) == f.default for f in fields(preset().threshold))


def test_no_group_may_be_called_rest() -> None:
    with pytest.raises(ArgumentError, match="another name"):
        group_norm({"rest": ("head", 1.0)})
