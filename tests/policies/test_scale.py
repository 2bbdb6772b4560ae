"""A norm up to its bound is left exactly as it is, and rules that follow norms are the same at any scale of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distclip
from distclip import Fixed, GradClipper, NormPolicy, RelativeToWeight
from distclip.norms.reduce import Totals
from distclip.policies import State
from tests.policies.norms import many, totals, traces

CPU = torch.device("cpu")


class AboveTheLast:
    """A custom threshold: 20 % above the last norm."""

    def __repr__(self) -> str:
        return "AboveTheLast()"

    def init(self, slots: int, device: torch.device) -> State:
        return {"last": torch.full((slots,), inf, dtype=torch.float64, device=device)}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        return 1.2 * state["last"], {"last": totals.norms}


FOLLOWING: dict[str, Callable[[float], NormPolicy]] = {
    "autoclip": lambda scale: distclip.autoclip(40, window=4),
    "autoclip, capped": lambda scale: distclip.autoclip(90, window=9, cap=1.5 * scale),
    "zclip": lambda scale: distclip.zclip(1.5, 0.8, warmup=3, restart_after=0),
    "zclip, restarting": lambda scale: distclip.zclip(1.0, 0.5, warmup=2, restart_after=4),
    "zclip, capped": lambda scale: distclip.zclip(1.5, 0.8, warmup=3, cap=2 * scale, restart_after=5),
    "ema": lambda scale: distclip.ema(1.7, 1.1, 0.9, 0.6, warmup=2, restart_after=0),
    "ema, restarting": lambda scale: distclip.ema(1.2, 1.0, 0.99, 0.9, warmup=1, restart_after=4),
    "ema, capped": lambda scale: distclip.ema(1.5, 2.0, 0.5, 0.0, warmup=2, cap=1.3 * scale),
    # The bound of the warm-up is absolute, like a cap.
    "adagc": lambda scale: distclip.adagc(1.2, 0.8, warmup=2, warmup_norm=scale),
    "adagc, restarting": lambda scale: distclip.adagc(1.04, 0.9, warmup=3, warmup_norm=inf, restart_after=4),
    "adagc, capped": lambda scale: distclip.adagc(1.5, 0.9, warmup=4, warmup_norm=3 * scale, cap=0.7 * scale),
    "median_mad": lambda scale: NormPolicy(distclip.MedianMAD(1.5, window=4, warmup=2)),
    "median_mad, capped": lambda scale: distclip.median_mad(1.0, window=9, warmup=1, cap=1.5 * scale),
    "custom": lambda scale: NormPolicy(AboveTheLast()),
}
"""Policies whose bounds follow the norms, with their absolute bounds times a scale."""

few = settings(many, max_examples=8)
each_following = pytest.mark.parametrize("name", FOLLOWING)


def decide(policy: NormPolicy, trace: list[list[float]], scale: float) -> tuple[Tensor, Tensor, State]:
    """Return the coefficients and the bounds of every step, and the last state."""
    state, coefs, bounds = policy.init(len(trace[0]), CPU), [], []
    for norms in trace:
        verdict, state = policy.decide(totals(scale * np.array(norms)), state)
        assert verdict.bounds is not None
        coefs.append(verdict.coefs)
        bounds.append(verdict.bounds)
    return torch.stack(coefs), torch.stack(bounds), state


@each_following
@few
@given(trace=traces(), exponent=st.integers(-100, 100))
def test_powers_of_two_change_no_bit(name: str, trace: list[list[float]], exponent: int) -> None:
    """Scale all norms by a power of two, which is exact. Only logarithms round it."""
    scale = 2.0**exponent
    coefs, bounds, state = decide(FOLLOWING[name](1.0), trace, 1.0)
    scaled_coefs, scaled_bounds, scaled_state = decide(FOLLOWING[name](scale), trace, scale)
    # The coefficient of a norm of 0 is 1, and so is that of a bound of inf.
    finite = torch.tensor(trace, dtype=torch.float64).isfinite().all(1)
    assert not coefs[finite].isnan().any()
    rtol = 1e-12 if name.startswith("median_mad") else 0.0
    torch.testing.assert_close(scaled_coefs[finite], coefs[finite], rtol=rtol, atol=0)
    used = finite[:, None] & (torch.tensor(trace) > 0)
    torch.testing.assert_close(scaled_bounds[used], scale * bounds[used], rtol=rtol, atol=0)
    assert all(torch.equal(scaled_state[key], state[key]) for key in ("count", "restarts") if key in state)


@each_following
@few
@given(trace=traces(), exponent=st.floats(-30, 30))
def test_any_factor_scales_bounds(name: str, trace: list[list[float]], exponent: float) -> None:
    scale = 10.0**exponent
    coefs, bounds, _ = decide(FOLLOWING[name](1.0), trace, 1.0)
    scaled_coefs, scaled_bounds, _ = decide(FOLLOWING[name](scale), trace, scale)
    used = torch.tensor(trace, dtype=torch.float64).isfinite().all(1)[:, None] & (torch.tensor(trace) > 0)
    torch.testing.assert_close(scaled_coefs[used], coefs[used], rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled_bounds[used], scale * bounds[used], rtol=1e-6, atol=0)


@each_following
@few
@given(trace=traces(), exponent=st.floats(-30, 30))
def test_coefficient_is_one_up_to_the_bound_and_their_ratio_above(
    name: str, trace: list[list[float]], exponent: float
) -> None:
    scale = 10.0**exponent
    coefs, bounds, _ = decide(FOLLOWING[name](scale), trace, scale)
    for norms, row, limits in zip(scale * np.array(trace), coefs.tolist(), bounds.tolist(), strict=True):
        for norm, coef, limit in zip(np.sqrt(norms**2), row, limits, strict=True):
            if np.isfinite(norms).all() and norm > 0:
                assert coef == (1.0 if norm <= limit else limit / norm)


FIXED: dict[str, Callable[[float], NormPolicy]] = {
    "default": lambda bound: NormPolicy(Fixed(bound)),
    "per_tensor_norm": distclip.per_tensor_norm,
    "group_norm": lambda bound: distclip.group_norm({"w": ("w", bound)}, bound),
    "rows": lambda bound: NormPolicy(Fixed(bound), per="row"),
    "largest element": lambda bound: distclip.per_tensor_norm(bound / 2, inf),
    "agc": lambda bound: distclip.agc(bound / 2, eps=1e-30),
    "agc per tensor": lambda bound: NormPolicy(RelativeToWeight(bound / 2, 1e-30), per="tensor"),
}
"""Policies with a constant bound, or one relative to weights of norm 2, in all granularities."""


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("name", FIXED)
def test_gradient_with_the_norm_of_the_bound_is_not_touched(name: str, scale: float) -> None:
    size = float(torch.tensor(scale, dtype=torch.float32))
    weight = torch.nn.Parameter(torch.ones(1, 4))
    for bound, coef in ((2 * size, 1.0), (4 * size, 1.0), (size, 0.5)):
        weight.grad = torch.full((1, 4), size)
        report = GradClipper([("w", weight)], FIXED[name](bound)).clip()
        # A group without parameters has the coefficient 1.
        assert float(report.coefs.min()) == pytest.approx(coef, rel=1e-12)
        assert bool(report.clipped) == (coef < 1)
        assert torch.equal(weight.grad, torch.full((1, 4), size * coef))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("preset", [distclip.adagc, distclip.zclip, distclip.ema, distclip.median_mad])
def test_steady_gradient_is_never_clipped(preset: Any, scale: float) -> None:
    """Take the same gradient at every step, next to one of another size."""
    options = {"warmup_norm": inf} if preset is distclip.adagc else {}
    one, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    clipper = GradClipper([("one", one), ("other", other)], preset(warmup=3, per="tensor", **options))
    other.grad = torch.ones(4)
    for _ in range(12):
        one.grad = torch.full((4,), scale)
        assert not clipper.clip().clipped
    assert torch.equal(one.grad, torch.full((4,), scale))


@pytest.mark.parametrize("norm", [1e-30, 1e-6, 1 - 1e-7, 1.0, 3.0])
def test_global_norm_keeps_the_formula_of_torch(norm: float) -> None:
    verdict, _ = distclip.global_norm(1.0).decide(totals([norm]), {})
    assert verdict.coefs.item() == min(1.0, 1.0 / (math.sqrt(norm**2) + 1e-6))


@each_following
def test_slots_without_gradient_have_no_nan(name: str) -> None:
    trace = [[0.0, 0.0]] * 3 + [[0.0, 1.0]] * 3 + [[0.0, 0.0], [1e-30, 1.0]]
    coefs, _, state = decide(FOLLOWING[name](1.0), trace, 1.0)
    assert ((coefs >= 0) & (coefs <= 1)).all()
    assert (coefs[:3] == 1).all()
    assert not any(value.isnan().any() for value in state.values())
