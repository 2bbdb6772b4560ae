"""Scale norms and elements up: bands against their twin, coefficients above 1 in every path, magnitudes of elements."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distclip
from distclip import ArgumentError, GradClipper, NormPolicy, reference
from distclip.policies import Band, NormSpec, Rule, Verdict
from tests.policies.norms import many, totals, traces
from tests.ranks import on_ranks
from tests.rig import build_rig, whole_gradient

BANDS: list[dict[str, Any]] = [
    {"low": 0.9, "high": 1.2, "decay": 0.8, "warmup": 2},
    {"low": 0.9, "high": 0.7, "warmup": 1, "decay": 0.5},  # the floor is above the bound, which wins
    {"low": 0.2, "high": 3.0, "late_low": 0.8, "late_high": 1.1, "switch": 4, "transition": 6, "warmup": 1, "cap": 2.0},
    {"low": 0.0, "high": 2.0, "late_low": 1.0, "switch": 3, "min_norm": 0.5, "max_coef": 1.1, "warmup": 3},
]


@pytest.mark.parametrize("band", BANDS, ids=str)
@many
@given(trace=traces())
def test_band_equals_its_twin(band: dict[str, Any], trace: list[list[float]]) -> None:
    """Compare coefficients slot by slot. The twin sees finite steps and positive norms only."""
    policy, norms = (
        NormPolicy(Band(**band), restart_after=0),
        [norms for norms in trace if all(map(math.isfinite, norms))],
    )
    state = policy.init(len(trace[0]), torch.device("cpu"))
    past: list[list[float]] = [[] for _ in trace[0]]
    for row in norms:
        verdict, state = policy.decide(totals(row), state)
        for slot, (norm, coef) in enumerate(zip(row, verdict.coefs.tolist(), strict=True)):
            if norm == 0:
                assert coef == 1
                continue
            past[slot].append(norm)
            floor, bound = reference.aggc_bands(past[slot], **band)[-1]
            up = min(floor / norm, band.get("max_coef", 10.0)) if norm < floor else 1.0
            expected = bound / norm if norm > bound else up
            assert math.isclose(coef, expected, rel_tol=1e-7), f"slot {slot}, norms {past[slot]}"


def band_policy(**options: Any) -> NormPolicy:
    return distclip.aggc(0.5, 2.0, warmup=1, per="model", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_small_gradients_are_scaled_up(dtype: torch.dtype, fused: bool) -> None:
    """Step with a norm of 2, and then with one of 0.5, which becomes 1. The report has the coefficients."""
    weight = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    clipper = GradClipper([weight], band_policy())
    for norm, coef in ((2.0, 1.0), (0.5, 2.0), (0.001, 10.0), (1e-7, 10.0)):
        weight.data.zero_()
        grad = torch.full((4,), norm / 2).to(dtype)
        weight.grad = grad.clone()
        report = clipper.step(optimizer)
        expected = float(grad.double().norm()) * coef
        assert float(report.coef) == pytest.approx(coef, rel=1e-3)
        assert float(weight.detach().double().norm()) == pytest.approx(expected, rel=4e-3)
        assert bool(report.clipped) == (coef != 1)


def test_a_gradient_of_zeros_stays_zero() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    clipper = GradClipper([weight], band_policy(min_norm=1.0))
    for value in (1.0, 0.0):
        weight.grad = torch.full((2,), value)
        report = clipper.clip()
    assert not weight.grad.any()
    assert float(report.coef) == 1


def test_scaling_up_with_a_loss_scale() -> None:
    """The scaled gradients of the second step have a norm of 0.5, and step with 1."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    clipper = GradClipper([weight], band_policy())
    for norm in (2.0, 0.5):
        weight.data.zero_()
        optimizer.zero_grad()
        scaler.scale(norm * weight.sum()).backward()  # type: ignore[no-untyped-call]
        clipper.step(optimizer, scaler)
        scaler.update()
    assert weight.item() == -1.0


def test_scaling_up_is_not_frequent_clipping() -> None:
    """Scale up in every step of 200, without a warning that the policy clips too often."""
    weight = torch.nn.Parameter(torch.zeros(1))
    clipper = GradClipper([weight], band_policy(min_norm=1.0))
    for _ in range(200):
        weight.grad = torch.tensor([0.5])
        assert float(clipper.clip().coef) != 1 or clipper.steps == 1


class Raises:
    """A policy of a user that scales everything up."""

    spec = NormSpec()

    def __init__(self, coef: float, max_coef: float) -> None:
        self.coef, self.max_coef = coef, max_coef

    def init(self, slots: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {}

    def decide(self, totals: Any, state: Any) -> Any:
        return Verdict(torch.full_like(totals.norms, self.coef), max_coef=self.max_coef), state


class Floor(Rule):
    """A threshold of a user with a floor."""

    max_coef = 4.0

    def init(self, slots: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {}

    def __call__(self, totals: Any, state: Any) -> Any:
        return torch.full_like(totals.norms, 10.0), state

    def floors(self, totals: Any, state: Any) -> torch.Tensor:
        return torch.ones_like(totals.norms)


def test_policies_of_users_declare_their_largest_coefficient() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    for policy, expected in ((Raises(3.0, 3.0), 1.5), (NormPolicy(Floor()), 1.0)):
        weight.grad = torch.tensor([0.5])
        GradClipper([weight], policy).clip()
        assert weight.grad.item() == expected
    for policy in (Raises(3.0, 2.0), Raises(3.0, math.inf)):
        with pytest.raises(ArgumentError, match="max_coef"):
            GradClipper([weight], policy).clip()
    with pytest.raises(ArgumentError, match=r"max_coef=0\.5"):
        NormPolicy(type("Low", (Floor,), {"max_coef": 0.5})())


@on_ranks(2)
def test_groups_are_scaled_up_on_all_ranks() -> None:
    """Shrink sharded gradients tenfold, which the floor of half the mean scales up by 5."""
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.aggc(0.5, 2.0, {"first": "^0"}, warmup=1))
    for scale, coef in ((1.0, 1.0), (0.1, 5.0)):
        rig.fill(0, scale)
        report = clipper.clip()
        assert report.coefs.tolist() == pytest.approx([coef, coef], rel=1e-6)
        assert float(report.coef) == pytest.approx(coef, rel=1e-6)
        for name, grad in rig.gather_whole(lambda param: param.grad).items():
            expected = whole_gradient(name, tuple(grad.shape), 0) * scale * coef
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


ELEMENTS = st.lists(st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, -0.0, 1e-30])), min_size=1, max_size=8)


@many
@given(ELEMENTS, st.floats(0, 1, width=32), st.floats(1, 3, width=32))
def test_bi2clip_limits_magnitudes(values: list[float], low: float, high: float) -> None:
    """Compare with sgn(g) · min(max(|g|, low), high), where the sign of 0 is 0. The report tells whether it acted."""
    weight = torch.nn.Parameter(torch.zeros(len(values)))
    weight.grad = torch.tensor(values)
    report = GradClipper([weight], distclip.bi2clip(low, high)).clip()
    expected = [
        math.copysign(min(max(abs(v), low), high), v) if v else v for v in weight.grad.new_tensor(values).tolist()
    ]
    assert weight.grad.tolist() == expected
    assert bool(report.clipped) == (expected != torch.tensor(values).tolist())


@pytest.mark.parametrize("kind", ["sparse", "bfloat16", "scaler"])
def test_bi2clip_takes_other_gradients(kind: str) -> None:
    """Take rows of an embedding that were not used, another dtype, and gradients that carry a loss scale."""
    weight = torch.nn.Parameter(torch.zeros(3, 1, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper, scaler = GradClipper([weight], distclip.bi2clip(0.25, 0.5)), None
    grad = torch.tensor([[0.125], [0.0], [-2.0]], dtype=weight.dtype)
    if kind == "scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale((weight * grad).sum()).backward()  # type: ignore[no-untyped-call]
    else:
        weight.grad = grad.to_sparse(1) if kind == "sparse" else grad
    clipper.step(optimizer, scaler)
    assert weight.flatten().tolist() == [-0.25, 0.0, 0.5]


@pytest.mark.parametrize("limits", [(0.5, 0.25), (-0.1, 1.0), (math.nan, 1.0), (0.1, "high")], ids=str)
def test_bi2clip_refuses_other_limits(limits: Any) -> None:
    with pytest.raises(ArgumentError, match=r"(low|high)=.*(Use|Pass)"):
        distclip.bi2clip(*limits)


def test_bi2clip_refuses_complex_gradients() -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    weight.grad = torch.ones(1, dtype=torch.complex64)
    with pytest.raises(distclip.LayoutError, match="complex"):
        GradClipper([weight], distclip.bi2clip()).clip()
