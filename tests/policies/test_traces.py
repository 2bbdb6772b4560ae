"""Measure each policy on the norms of training runs: healthy ones, a spike, a burst, and a new level.

Norms are lognormal around 1. Their logarithms scatter by .25 ("wide") or by .05 ("narrow"). All runs are slots of one
policy. Each claim of the documentation about behavior has a row here, with the number that was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
from torch import Tensor

from distclip.norms.reduce import Totals
from distclip.policies import NormPolicy, State, adagc, autoclip, ema, global_norm, median_mad, zclip
from tests.tables.policies import ADAPTIVE

RUNS, START = 12, 400

POLICIES: dict[str, Callable[..., NormPolicy]] = {
    "fixed 2": lambda: global_norm(2.0),
    "autoclip 10": lambda: autoclip(10.0),
    "autoclip 90": lambda: autoclip(90.0),
    "zclip": zclip,
    "zclip, published": lambda: zclip(restart_after=0),
    "ema": ema,
    "ema, published": lambda: ema(restart_after=0),
    # The total norm of independent runs has no meaning, so the bound on it is infinite.
    "adagc": lambda: adagc(warmup_norm=inf),
    "adagc 1.05": lambda: adagc(1.05, 0.98, warmup_norm=inf),
    "adagc 2": lambda: adagc(2.0, warmup_norm=inf),
    "adagc, restarting": lambda: adagc(warmup_norm=inf, restart_after=128),
    "median_mad": median_mad,
}

EVERY_POLICY = POLICIES | {f"{name}, small": row.small for name, row in ADAPTIVE.items() if row.small is not None}
"""The policies above, and those of the table with small windows."""


def norms(steps: int) -> Tensor:
    """Return (steps, 2, RUNS) norms of wide and of narrow runs, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 2, RUNS, generator=generator, dtype=torch.float64)
    return (noise * torch.tensor([[0.25], [0.05]])).exp()


def run(policy: NormPolicy, trace: Tensor) -> tuple[Tensor, State]:
    """Return the coefficient of every step and run, and the last state."""
    state = policy.init(2 * RUNS, torch.device("cpu"))
    coefs = []
    for row in trace:
        verdict, state = policy.decide(Totals(row.flatten() ** 2), state)
        coefs.append(verdict.coefs)
    return torch.stack(coefs).view_as(trace), state


def clip_rate(policy: NormPolicy, after: int = START) -> Tensor:
    """Return the percentage of 1000 healthy steps that are clipped."""
    coefs, _ = run(policy, norms(after + 1000))
    return 100 * (coefs[after:] < 1).double().mean((0, 2))


def late_clip_rate(policy: NormPolicy) -> Tensor:
    """Return it after 2000 steps, because AdaGC's average rises slowly from the least norm of its warm-up."""
    return clip_rate(policy, 2000)


def spike(policy: NormPolicy) -> Tensor:
    """Return the norm after clipping of a spike of 50."""
    trace = norms(START + 1)
    trace[START] = 50
    coefs, _ = run(policy, trace)
    return (coefs * trace)[START].mean(1)


def burst(policy: NormPolicy) -> Tensor:
    """Return the mean norm after clipping of 20 consecutive norms that are 20 times too large."""
    trace = norms(START + 20)
    trace[START:] *= 20
    coefs, _ = run(policy, trace)
    return (coefs * trace)[START:].mean((0, 2))


@dataclass(frozen=True)
class Row:
    """A measured number in wide and in narrow runs, and how much another random run may differ."""

    policy: str
    measure: Callable[[NormPolicy], Tensor]
    measured: tuple[float, float]
    within: float


TABLE = [
    Row("fixed 2", clip_rate, (0.2, 0.0), 0.1),
    Row("autoclip 10", clip_rate, (90.0, 90.0), 1.5),
    Row("autoclip 90", clip_rate, (10.2, 10.2), 1.5),
    Row("zclip", clip_rate, (3.2, 1.3), 0.4),
    Row("ema", clip_rate, (0.2, 0.0), 0.15),
    Row("adagc", clip_rate, (89.7, 29.6), 2.0),
    Row("adagc", late_clip_rate, (73.5, 26.5), 2.0),
    Row("adagc 1.05", clip_rate, (73.3, 19.5), 2.0),
    Row("adagc 2", clip_rate, (0.2, 0.0), 0.1),
    Row("adagc, restarting", clip_rate, (47.5, 26.5), 3.0),
    Row("median_mad", clip_rate, (0.2, 0.0), 0.1),
    Row("fixed 2", spike, (2.0, 2.0), 1e-6),
    Row("autoclip 10", spike, (0.73, 0.94), 0.03),
    Row("autoclip 90", spike, (1.37, 1.07), 0.03),
    Row("zclip", spike, (1.0, 1.0), 0.1),
    Row("ema", spike, (1.1, 1.1), 0.1),
    Row("adagc", spike, (0.6, 1.0), 0.1),
    Row("adagc 2", spike, (2.0, 2.0), 0.15),
    Row("median_mad", spike, (2.0, 1.35), 0.1),
    Row("fixed 2", burst, (2.0, 2.0), 1e-6),
    Row("zclip", burst, (1.0, 1.0), 0.1),
    Row("ema", burst, (1.2, 1.2), 0.1),
    Row("adagc 2", burst, (2.2, 2.2), 0.2),
    Row("median_mad", burst, (2.25, 1.35), 0.1),
]


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.policy} {row.measure.__name__}" for row in TABLE])
def test_measured_behavior(row: Row) -> None:
    assert row.measure(POLICIES[row.policy]()).tolist() == pytest.approx(row.measured, abs=row.within)


NEVER = (inf, inf)
FOLLOWED: list[tuple[str, float, tuple[float, float], tuple[float, float]]] = [
    ("median_mad", 3.0, (21, 35), (58, 60)),
    ("median_mad", 10.0, (39, 50), (60, 60)),
    ("ema, published", 3.0, (77, 130), (74, 86)),
    ("ema", 3.0, (66, 90), (61, 61)),
    ("adagc 2", 3.0, (64, 89), (37, 43)),
    ("adagc", 3.0, NEVER, NEVER),
    # A quarter of the wide runs follows without a restart.
    ("zclip, published", 3.0, (61, inf), NEVER),
    ("zclip, published", 10.0, NEVER, NEVER),
    ("zclip", 3.0, (58, 62), (58, 61)),
    ("zclip", 10.0, (57, 60), (58, 61)),
]
"""Policy, factor of a new level, and the steps after which the first and the last run follow it, wide and narrow."""


@pytest.mark.parametrize(("name", "factor", "wide", "narrow"), FOLLOWED)
def test_follows_a_new_level(name: str, factor: float, wide: tuple[float, float], narrow: tuple[float, float]) -> None:
    """Find the first step from which less than 10 % of 50 steps are clipped."""
    trace = norms(START + 600)
    trace[START:] *= factor
    coefs, _ = run(POLICIES[name](), trace)
    follows = (coefs[START:] < 1).double().unfold(0, 50, 1).mean(-1) < 0.1
    first = torch.where(follows.any(0), follows.double().argmax(0), inf)
    for runs, measured in zip(first, (wide, narrow), strict=True):
        assert (float(runs.min()), float(runs.max())) == pytest.approx(measured, abs=8)


def test_zclip_as_published_clips_every_step_of_a_new_level() -> None:
    """Raise the norms tenfold: without restarts every step is clipped to the old mean, with restarts none."""
    trace = norms(START + 600)
    trace[START:] *= 10
    coefs, _ = run(zclip(restart_after=0), trace)
    assert coefs[-100:].mean((0, 2)).tolist() == pytest.approx([0.1, 0.1], abs=0.015)
    coefs, state = run(zclip(), trace)
    assert (coefs[-100:].mean((0, 2)) > 0.99).all()
    assert state["restarts"].tolist() == [1] * 2 * RUNS


@pytest.mark.parametrize("name", ["zclip", "ema", "median_mad", "adagc 2"])
def test_healthy_runs_restart_no_rule(name: str) -> None:
    _, state = run(POLICIES[name](), norms(1000))
    assert "restarts" not in state or not state["restarts"].any()


def test_adagc_restarts_in_healthy_runs() -> None:
    """Restart AdaGC, which is off by default because it clips more than half of all healthy steps."""
    _, state = run(POLICIES["adagc, restarting"](), norms(1000))
    assert (state["restarts"][:RUNS] >= 3).all()


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_nonfinite_step_changes_no_later_step(name: str) -> None:
    """Compare bit by bit with runs that do not have the step."""
    trace = norms(200)
    nonfinite = trace[[120, 120]].clone()
    nonfinite[0, 0, 3], nonfinite[1, 1, 5] = nan, inf
    coefs, _ = run(EVERY_POLICY[name](), torch.cat([trace[:120], nonfinite, trace[120:]]))
    without, _ = run(EVERY_POLICY[name](), trace)
    assert torch.equal(coefs[:120], without[:120])
    assert torch.equal(coefs[122:], without[120:])
