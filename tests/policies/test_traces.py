"""What each policy does to the norms of a training run: to healthy ones, to a spike, a burst, and a new level.

Norms are lognormal around 1; their logarithms scatter by .25 ("wide") or by .05 ("narrow"). All runs lie beside each
other as slots of one policy. Every claim about behaviour that the documentation makes stands in a row here, with the
number that was measured.
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

RUNS, START = 12, 400
ZERO = torch.zeros(())

POLICIES: dict[str, Callable[[], NormPolicy]] = {
    "fixed 2": lambda: global_norm(2.0),
    "autoclip 10": lambda: autoclip(10.0),
    "autoclip 90": lambda: autoclip(90.0),
    "zclip": zclip,
    "zclip, published": lambda: zclip(restart_after=0),
    "ema": ema,
    "ema, published": lambda: ema(restart_after=0),
    # The norm of all runs together means nothing here.
    "adagc": lambda: adagc(warmup_norm=inf),
    "adagc 1.05": lambda: adagc(1.05, 0.98, warmup_norm=inf),
    "adagc 2": lambda: adagc(2.0, warmup_norm=inf),
    "adagc, reseed": lambda: adagc(warmup_norm=inf, restart_after=128),
    "median_mad": median_mad,
}


def norms(steps: int) -> Tensor:
    """(steps, 2, RUNS), the first half of the runs wide, the second narrow; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 2, RUNS, generator=generator, dtype=torch.float64)
    return (noise * torch.tensor([[0.25], [0.05]])).exp()


def run(policy: NormPolicy, trace: Tensor) -> tuple[Tensor, State]:
    """The coefficient of every step and run, and the last state."""
    state = policy.init(2 * RUNS, torch.device("cpu"))
    coefs = []
    for row in trace:
        verdict, state = policy.decide(Totals(row.flatten() ** 2, 2.0, ZERO, ZERO, ZERO), state)
        coefs.append(verdict.coefs)
    return torch.stack(coefs).view_as(trace), state


def clipped(policy: NormPolicy, after: int = START) -> Tensor:
    """How many of 1000 steps are clipped, in %, where nothing happens."""
    coefs, _ = run(policy, norms(after + 1000))
    return 100 * (coefs[after:] < 1).double().mean((0, 2))


def clipped_late(policy: NormPolicy) -> Tensor:
    """The same after two thousand steps: AdaGC's average comes up from the least norm of its warm-up slowly."""
    return clipped(policy, 2000)


def spike(policy: NormPolicy) -> Tensor:
    """To which norm one that is 50 is cut."""
    trace = norms(START + 1)
    trace[START] = 50
    coefs, _ = run(policy, trace)
    return (coefs * trace)[START].mean(1)


def burst(policy: NormPolicy) -> Tensor:
    """What is left on average of 20 steps in a row that are 20 times too large."""
    trace = norms(START + 20)
    trace[START:] *= 20
    coefs, _ = run(policy, trace)
    return (coefs * trace)[START:].mean((0, 2))


@dataclass(frozen=True)
class Row:
    """What was measured, in wide runs and in narrow ones, and how far another random run may lie from it."""

    policy: str
    what: Callable[[NormPolicy], Tensor]
    measured: tuple[float, float]
    within: float


TABLE = [
    Row("fixed 2", clipped, (0.2, 0.0), 0.1),
    Row("autoclip 10", clipped, (90.0, 90.0), 1.5),
    Row("autoclip 90", clipped, (10.2, 10.2), 1.5),
    Row("zclip", clipped, (3.2, 1.3), 0.4),
    Row("ema", clipped, (0.2, 0.0), 0.15),
    Row("adagc", clipped, (89.7, 29.6), 2.0),
    Row("adagc", clipped_late, (73.5, 26.5), 2.0),
    Row("adagc 1.05", clipped, (73.3, 19.5), 2.0),
    Row("adagc 2", clipped, (0.2, 0.0), 0.1),
    Row("adagc, reseed", clipped, (47.5, 26.5), 3.0),
    Row("median_mad", clipped, (0.2, 0.0), 0.1),
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


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.policy} {row.what.__name__}" for row in TABLE])
def test_what_is_clipped(row: Row) -> None:
    assert row.what(POLICIES[row.policy]()).tolist() == pytest.approx(row.measured, abs=row.within)


NEVER = (inf, inf)
FOLLOWED: list[tuple[str, float, tuple[float, float], tuple[float, float]]] = [
    ("median_mad", 3.0, (21, 35), (58, 60)),
    ("median_mad", 10.0, (39, 50), (60, 60)),
    ("ema, published", 3.0, (77, 130), (74, 86)),
    ("ema", 3.0, (66, 90), (61, 61)),
    ("adagc 2", 3.0, (64, 89), (37, 43)),
    ("adagc", 3.0, NEVER, NEVER),
    # A quarter of the wide runs finds back by itself.
    ("zclip, published", 3.0, (61, inf), NEVER),
    ("zclip, published", 10.0, NEVER, NEVER),
    ("zclip", 3.0, (58, 62), (58, 61)),
    ("zclip", 10.0, (57, 60), (58, 61)),
]
"""A level that is higher for good: by which factor, and after how many steps the first run and the last follow it,
wide and narrow."""


@pytest.mark.parametrize(("name", "factor", "wide", "narrow"), FOLLOWED)
def test_who_follows_a_new_level(
    name: str, factor: float, wide: tuple[float, float], narrow: tuple[float, float]
) -> None:
    """Followed is a level once less than 10 % of the next 50 steps are clipped."""
    trace = norms(START + 600)
    trace[START:] *= factor
    coefs, _ = run(POLICIES[name](), trace)
    calm = (coefs[START:] < 1).double().unfold(0, 50, 1).mean(-1) < 0.1
    first = torch.where(calm.any(0), calm.double().argmax(0), inf)
    for runs, measured in zip(first, (wide, narrow), strict=True):
        assert (float(runs.min()), float(runs.max())) == pytest.approx(measured, abs=8)


def test_zclip_as_published_keeps_the_coefficient_of_a_new_level() -> None:
    """Ten times higher: every step is cut to the old mean, hundreds of steps later too; with the escape, none."""
    trace = norms(START + 600)
    trace[START:] *= 10
    coefs, _ = run(zclip(restart_after=0), trace)
    assert coefs[-100:].mean((0, 2)).tolist() == pytest.approx([0.1, 0.1], abs=0.015)
    coefs, state = run(zclip(), trace)
    assert (coefs[-100:].mean((0, 2)) > 0.99).all()
    assert state["restarts"].tolist() == [1] * 2 * RUNS


@pytest.mark.parametrize("name", ["zclip", "ema", "median_mad", "adagc 2"])
def test_a_healthy_run_is_never_started_anew(name: str) -> None:
    _, state = run(POLICIES[name](), norms(1000))
    assert "restarts" not in state or not state["restarts"].any()


def test_adagc_cannot_tell_a_lost_run_from_a_healthy_one() -> None:
    """Why its `reseed` is off: it clips more than half of all steps anyway."""
    _, state = run(POLICIES["adagc, reseed"](), norms(1000))
    assert (state["restarts"][:RUNS] >= 3).all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    """The rest of the runs has the bits that it has without such steps."""
    trace = norms(200)
    torn = trace[[120, 120]].clone()
    torn[0, 0, 3], torn[1, 1, 5] = nan, inf
    coefs, _ = run(POLICIES[name](), torch.cat([trace[:120], torn, trace[120:]]))
    without, _ = run(POLICIES[name](), trace)
    assert torch.equal(coefs[:120], without[:120])
    assert torch.equal(coefs[122:], without[120:])
