"""Every rule against its twin in `reference`: whatever the norms, in however many slots, with bad steps thrown in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
    autoclip,
    ema,
    global_norm,
    group_norm,
    median_mad,
    per_tensor_norm,
    zclip,
)
from distclip.policies.history import append, quantile

CPU = torch.device("cpu")
ZERO = torch.zeros(())
EPS = 1e-6

many = settings(deadline=None, database=None, derandomize=True, max_examples=25)


def totals(norms: Sequence[float] | Tensor, weight_norms: Sequence[float] | None = None) -> Totals:
    """What a step with these norms would reduce to."""
    weight = None if weight_norms is None else torch.tensor(weight_norms, dtype=torch.float64) ** 2
    return Totals(torch.as_tensor(norms, dtype=torch.float64) ** 2, 2.0, ZERO, ZERO, ZERO, weight)


def run(policy: NormPolicy, trace: Sequence[Sequence[float]]) -> Iterator[tuple[list[float], State, State]]:
    """(coefs, state before, state after) of every step."""
    state = policy.init(len(trace[0]), CPU)
    for norms in trace:
        verdict, after = policy.decide(totals(norms), state)
        yield verdict.coefs.tolist(), state, after
        state = after


def coefs(policy: NormPolicy, trace: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of every step."""
    return [coef for coef, _, _ in run(policy, trace)]


def same(state: State, other: State) -> bool:
    """To the last bit."""
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


@dataclass(frozen=True)
class Case:
    """A rule with small windows, and the twin with the same arguments."""

    threshold: Any
    twin: Callable[[Sequence[float], Sequence[float]], list[float]]

    def expected(self, trace: Sequence[Sequence[float]]) -> list[list[float]]:
        """Coefficients by the twin, slot by slot, each of which sees its own norms alone; NaN where it sees none."""
        found = [[nan] * len(trace[0]) for _ in trace]
        whole = [math.sqrt(math.fsum(n * n for n in norms)) for norms in trace]
        for slot in range(len(trace[0])):
            seen = [t for t, norms in enumerate(trace) if all(map(math.isfinite, norms)) and norms[slot] > 0]
            bounds = self.twin([trace[t][slot] for t in seen], [whole[t] for t in seen])
            for t, bound in zip(seen, bounds, strict=True):
                found[t][slot] = min(1.0, bound / (trace[t][slot] + EPS))
        return found


CASES = {
    "percentile": Case(Percentile(10, 7), lambda n, _: reference.autoclip_bounds(n, 10, 7)),
    "percentile, odd": Case(Percentile(62.5, 30, 2.0), lambda n, _: reference.autoclip_bounds(n, 62.5, 30, 2.0)),
    "percentile, least": Case(Percentile(0, 5), lambda n, _: reference.autoclip_bounds(n, 0, 5)),
    "percentile, largest": Case(Percentile(100, 1), lambda n, _: reference.autoclip_bounds(n, 100, 1)),
    "zscore": Case(ZScore(2.5, 0.9, 6), lambda n, _: reference.zclip_bounds(n, 2.5, 0.9, 6)),
    "zscore, capped": Case(ZScore(1.0, 0.5, 3, cap=1.5), lambda n, _: reference.zclip_bounds(n, 1.0, 0.5, 3, cap=1.5)),
    "zscore, coarse": Case(ZScore(2, 0, 1, 0.1), lambda n, _: reference.zclip_bounds(n, 2, 0, 1, 0.1)),
    "ema": Case(EMA(2.0, 1.1, 0.9, 0.7, 5), lambda n, _: reference.ema_bounds(n, 2.0, 1.1, 0.9, 0.7, 5)),
    "ema, capped": Case(
        EMA(1.2, 1.0, 0.99, 0.9, 1, 1.3), lambda n, _: reference.ema_bounds(n, 1.2, 1.0, warmup=1, cap=1.3)
    ),
    "ema, at once": Case(EMA(1.5, 2.0, 0.5, 0.0, 2), lambda n, _: reference.ema_bounds(n, 1.5, 2.0, 0.5, 0.0, 2)),
    "adagc": Case(AdaGC(1.04, 0.9, 5), lambda n, all_: reference.adagc_bounds(n, all_, 1.04, 0.9, 5)),
    "adagc, loose": Case(AdaGC(2, 0.8, 1, inf), lambda n, all_: reference.adagc_bounds(n, all_, 2, 0.8, 1, inf)),
    "adagc, capped": Case(
        AdaGC(1.5, 0.9, 4, 3.0, cap=0.7), lambda n, all_: reference.adagc_bounds(n, all_, 1.5, 0.9, 4, 3.0, cap=0.7)
    ),
    "mad": Case(MedianMAD(3, 8, 4), lambda n, _: reference.median_mad_bounds(n, 3, 8, 4)),
    "mad, capped": Case(MedianMAD(1, 31, 1, 0, 1.5), lambda n, _: reference.median_mad_bounds(n, 1, 31, 1, 0, 1.5)),
    "mad, odd": Case(MedianMAD(0.5, 5, 9, 0.2), lambda n, _: reference.median_mad_bounds(n, 0.5, 5, 9, 0.2)),
}
"""One with the defaults' proportions and some at the edges of each rule."""


EVENTS = {"spike": 50.0, "dip": 0.01, "zero": 0.0, "level": 5.0, "late": 0.0, "nan": nan, "inf": inf}
"""What happens to a norm; the last ones are not finite, and nothing happens to those any more."""


@st.composite
def traces(draw: st.DrawFn) -> list[list[float]]:
    """Norms by step and slot: any scatter around levels that move, spikes, zeros, steps that are not finite."""
    steps, slots = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    norms = np.exp(draw(st.sampled_from([0.0, 0.05, 0.25, 1.0])) * rng.standard_normal((steps, slots)))
    if draw(st.booleans()):
        norms *= 10.0 ** rng.uniform(-3, 3, slots)
    places = st.tuples(st.sampled_from(list(EVENTS)), st.integers(0, steps - 1), st.integers(0, slots - 1))
    for what, t, slot in sorted(draw(st.lists(places, max_size=8)), key=lambda place: list(EVENTS).index(place[0])):
        if what in ("level", "late"):
            norms[slice(t, None) if what == "level" else slice(t), slot] *= EVENTS[what]
        elif math.isfinite(EVENTS[what]):
            norms[t, slot] *= EVENTS[what]
        else:
            norms[t, slot] = EVENTS[what]
    return norms.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@many
@given(trace=traces())
def test_a_rule_is_its_formula(case: Case, trace: list[list[float]]) -> None:
    """Each slot as if alone, steps that are not finite as if they had not been, nor zeros for their slot."""
    for (t, row), expected in zip(
        enumerate(coefs(NormPolicy(case.threshold, restart_after=0), trace)), case.expected(trace), strict=True
    ):
        for slot, (coef, wanted) in enumerate(zip(row, expected, strict=True)):
            if not math.isnan(wanted):
                assert math.isclose(coef, wanted, rel_tol=1e-7), f"step {t}, slot {slot}: {coef}, not {wanted}"


@pytest.mark.parametrize("window", [0, 10])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@many
@given(trace=traces())
def test_bad_steps_leave_no_trace(case: Case, window: int, trace: list[list[float]]) -> None:
    """Not finite anywhere: the state as it was. A zero: its slot as it was, with a factor that keeps a zero a zero."""
    for (_, norms), (row, before, after) in zip(
        enumerate(trace), run(NormPolicy(case.threshold, restart_after=window), trace), strict=True
    ):
        finite = all(map(math.isfinite, norms))
        assert finite or same(before, after)
        for slot, norm in enumerate(norms):
            if norm == 0:
                assert all(torch.equal(before[key][slot], after[key][slot]) for key in before)
                assert not finite or 0 <= row[slot] <= 1
        assert not any(value.isnan().any() for value in after.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@settings(many, max_examples=10)
@given(trace=traces())
def test_a_rule_is_a_pure_function(case: Case, trace: list[list[float]]) -> None:
    """The same inputs give the same bits, and stay what they were; the slot is the first dim of all there is."""
    policy = NormPolicy(case.threshold, restart_after=4)
    for norms, (row, before, after) in zip(trace, run(policy, trace), strict=True):
        kept = {key: value.clone() for key, value in before.items()}
        numbers = totals(norms)
        bound, _ = case.threshold(numbers, before)
        again, moved = policy.decide(numbers, before)
        assert same(before, kept)
        assert same(moved, after)
        assert np.array_equal(again.coefs.tolist(), row, equal_nan=True)
        assert bound.dtype == torch.float64
        assert all(value.shape[0] == len(norms) and value.dtype == before[key].dtype for key, value in after.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_rule_never_looks_at_a_number(case: Case) -> None:
    """No host sync: it goes through with tensors that have no numbers."""
    meta = torch.device("meta")
    policy = NormPolicy(case.threshold)
    zero = torch.zeros((), device=meta)
    state = policy.init(3, meta)
    value = torch.ones(3, dtype=torch.float64, device=meta)
    verdict, after = policy.decide(Totals(value, 2.0, zero, zero, zero), state)
    assert verdict.coefs.shape == (3,)
    assert {key: (v.shape, v.dtype) for key, v in after.items()} == {
        key: (v.shape, v.dtype) for key, v in state.items()
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_slots_do_not_see_each_other(case: Case) -> None:
    """Run one by one they have the bits of a run together (under an infinite bound on all, where there is one)."""
    threshold = replace(case.threshold, warmup_norm=inf) if isinstance(case.threshold, AdaGC) else case.threshold
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
def test_quantiles_are_numpys(values: list[float], window: int, q: float) -> None:
    """Of the last `window` values, beside a slot that has other ones."""
    history = torch.zeros(2, window, dtype=torch.float64)
    count = torch.tensor([0, 0])
    for i, value in enumerate(values):
        history = append(history, count, torch.tensor([value, -inf], dtype=torch.float64))
        count = count + 1
        found = quantile(history, count, q)[0].item()
        wanted = np.quantile(values[max(0, i + 1 - window) : i + 1], q)
        assert math.isclose(found, wanted, rel_tol=1e-12, abs_tol=1e-9)


@many
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0, 100), st.integers(1, 40))
def test_the_twin_of_autoclip_is_numpys_percentile(norms: list[float], p: float, window: int) -> None:
    wanted = [np.percentile(norms[max(0, t + 1 - window) : t + 1], p) for t in range(len(norms))]
    assert np.allclose(reference.autoclip_bounds(norms, p, window), wanted, rtol=1e-9, atol=0)


CAPPED = {
    "autoclip": autoclip(100, cap=2.0),
    "zclip": zclip(cap=2.0),
    "ema": ema(cap=2.0),
    "adagc": adagc(warmup_norm=inf, cap=2.0),
    "median_mad": median_mad(cap=2.0),
}


@pytest.mark.parametrize("policy", CAPPED.values(), ids=CAPPED.keys())
def test_a_cap_holds_from_the_first_step(policy: NormPolicy) -> None:
    """And what it cut off is not what the rule learns: after it, norms of 1 are left alone."""
    trace = [[1000.0, 1.0]] * 2 + [[1.0, 1.0]] * 40 + [[1000.0, 1.0]] + [[1.0, 1.0]] * 10
    for norms, row in zip(trace, coefs(policy, trace), strict=True):
        assert row[0] * norms[0] <= 2.0
        assert row[1] == pytest.approx(1, abs=1e-5)
        assert norms[0] > 1 or row[0] == pytest.approx(1, abs=1e-5)


def test_what_the_cap_cuts_is_not_the_rules_doing() -> None:
    """Norms above the cap for good: the rule has lost nothing that starting anew would find."""
    *_, (row, _, state) = run(zclip(cap=2.0, restart_after=16), [[10.0]] * 100)
    assert row[0] == pytest.approx(0.2)
    assert state["restarts"].item() == 0


def shifted(factor: float, steps: int = 300, slots: int = 1) -> list[list[float]]:
    """Norms that scatter by 5 % around 1, and from step 100 on around `factor`."""
    norms = np.exp(0.05 * np.random.default_rng(1).standard_normal((steps, slots)))
    norms[100:] *= factor
    return norms.tolist()  # type: ignore[no-any-return]


RESEEDED = {"zclip": zclip, "ema": ema}


@pytest.mark.parametrize("preset", RESEEDED.values(), ids=RESEEDED.keys())
def test_a_rule_that_clips_for_good_starts_anew(preset: Callable[..., NormPolicy]) -> None:
    """A level ten times higher is a new level, not two hundred spikes; the slot that had none starts nothing anew."""
    trace = [[a, b] for (a,), (b,) in zip(shifted(10.0), shifted(1.0), strict=True)]
    *_, (row, _, state) = run(preset(), trace)
    assert row == [1, 1]
    assert state["restarts"].tolist() == [1, 0]
    stuck = coefs(preset(restart_after=0), trace[:200])[-1]
    assert stuck[0] < 0.5
    assert stuck[1] == 1
    assert "restarts" not in preset(restart_after=0).init(2, CPU)


def test_zclip_without_it_is_stuck_for_ever() -> None:
    assert np.array(coefs(zclip(restart_after=0), shifted(10.0, 2000)))[-500:].max() < 0.15


def test_a_rule_can_start_anew_again() -> None:
    """Twice lost, twice found; and not before a window has passed."""
    trace = shifted(10.0) + [[100 * norm for (norm,) in [row]] for row in shifted(1.0)]
    restarts = [int(state["restarts"]) for _, _, state in run(zclip(), trace)]
    assert restarts[-1] == 2
    # Half of 128 steps have to be clipped first.
    assert restarts.index(1) == pytest.approx(100 + 64, abs=3)


def test_what_a_new_start_is_from() -> None:
    """Mean and variance of the raw window, no higher than the cap, and no second warm-up."""
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
    # The window of the first slot still holds a norm from the warm-up.
    assert AdaGC(cap=10.0).restart(norms, state)["gamma"].tolist() == [7.0, 6.0]


@pytest.mark.parametrize("rule", [Percentile(), MedianMAD()], ids=["percentile", "mad"])
def test_a_rule_that_remembers_raw_norms_is_not_watched(rule: Percentile | MedianMAD) -> None:
    """Nothing to start anew from, and no second copy of the last norms."""
    assert set(NormPolicy(rule).init(1, CPU)) == set(rule.init(1, CPU))


def test_the_warm_up_of_adagc_is_one_clip_of_all() -> None:
    """One coefficient for all slots; a slot that comes late has a warm-up of its own, and a bound in the end."""
    policy = adagc(warmup=3, warmup_norm=1.0)
    late = [[3.0, 4.0, 0.0]] * 5 + [[3.0, 4.0, 12.0]] * 5
    rows = coefs(policy, late)
    for row in rows[:3]:
        assert row[:2] == pytest.approx([0.2, 0.2], rel=1e-6)
    for row in rows[5:8]:
        assert row[2] == pytest.approx(1 / 13, rel=1e-6)
    assert rows[4][0] == pytest.approx(0.208, rel=1e-2)
    assert rows[9][2] == pytest.approx(1.04 / 13, rel=1e-2)


def test_a_bound_relative_to_the_weights() -> None:
    """Every row as the twin says; rows of zeros may leave zero."""
    weights, norms = [2.0, 0.0, 100.0, 5.0], [1.0, 1.0, 1.0, 0.0]
    policy = agc(0.01)
    assert policy.spec.needs_weights
    assert policy.init(4, CPU) == {}
    verdict, _ = policy.decide(totals(norms, weights), {})
    wanted = [min(1.0, reference.agc_bound(w) / n) if n else 1.0 for w, n in zip(weights, norms, strict=True)]
    assert verdict.coefs.tolist() == pytest.approx(wanted, rel=1e-12)
    assert verdict.coefs.tolist() == pytest.approx([0.02, 1e-5, 1.0, 1.0])
    assert not any(p.spec.needs_weights for p in (global_norm(), autoclip(), zclip()))


def test_groups_have_bounds_of_their_own() -> None:
    """In the order of the groups, and last the rest's."""
    groups = {"embedding": {"pattern": "embed", "max_norm": 1.0}, "head": ("head", "inf")}
    policy = group_norm(groups, max_norm=2.0)
    assert policy.per == "group"
    assert policy.groups == {"embedding": "embed", "head": "head"}
    verdict, _ = policy.decide(totals([4.0, 4.0, 4.0]), {})
    assert verdict.coefs.tolist() == pytest.approx([0.25, 1.0, 0.5], rel=1e-6)


def test_per_tensor_norm_is_keras_clipnorm() -> None:
    """No ε: exactly to the bound."""
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
    (AdaGC, {"eps": -1}),
    (ZScore, {"z": 0}),
    (MedianMAD, {"k": -1}),
    (MedianMAD, {"floor": -0.1}),
    (Fixed, {"max_norm": [1.0, -1.0]}),
]


@pytest.mark.parametrize(("rule", "passed"), BAD, ids=[f"{rule.__name__} {passed}" for rule, passed in BAD])
def test_what_cannot_be_meant_is_refused(rule: Callable[..., object], passed: dict[str, Any]) -> None:
    """It says what was seen, and what to write instead."""
    with pytest.raises(ArgumentError, match=r"Use") as raised:
        rule(**passed)
    (name, seen), *_ = passed.items()
    assert f"{name}={seen!r}" in str(raised.value)


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
def test_half_a_group_is_refused(groups: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        group_norm(groups)


def test_numbers_may_be_written_as_strings() -> None:
    """As configuration files do."""
    assert zclip("2.5", cap="inf", warmup="25") == zclip()
    assert Percentile("10", cap="1e3") == Percentile(10, cap=1000)
    assert isinstance(autoclip(window="50").threshold.window, int)


@pytest.mark.parametrize("preset", [autoclip, zclip, ema, adagc, median_mad])
def test_a_preset_is_its_rule(preset: Callable[..., NormPolicy]) -> None:
    """The same defaults, and the policy's own arguments reach it."""
    made = preset(norm_type="inf", per="row", cap=3.0)
    assert (made.norm_type, made.per, made.threshold.cap) == (inf, "row", 3.0)
    assert preset().per == ("tensor" if preset is adagc else "model")
    assert preset().threshold == type(preset().threshold)()
    assert all(getattr(preset().threshold, f.name) == f.default for f in fields(preset().threshold))


def test_a_group_cannot_be_the_rest() -> None:
    with pytest.raises(ArgumentError, match="another name"):
        group_norm({"rest": ("head", 1.0)})
