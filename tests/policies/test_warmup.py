"""Notice norms that explode in the warm-up of a policy without a cap, and start from the norms before that."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip import ExplodedWarmupWarning, GradClipper
from distclip.policies import NormPolicy

PRESETS = {"zclip": (distclip.zclip, 25), "ema": (distclip.ema, 20), "median_mad": (distclip.median_mad, 16)}


def run(policy: NormPolicy, norms: list[float], num_layers: int = 1) -> tuple[GradClipper, list[float], list[Warning]]:
    """Clip gradients of these norms, one per layer, and return the bounds and the warnings."""
    model = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1, bias=False) for i in range(num_layers)})
    clipper, bounds = GradClipper(model, policy), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in norms:
            for param in model.parameters():
                param.grad = torch.full_like(param, norm / num_layers**0.5)
            bounds.append(float(clipper.clip().bounds[0]))
    return clipper, bounds, [one.message for one in caught if isinstance(one.message, ExplodedWarmupWarning)]


def scattered(level: Callable[[float], float], num: int, scatter: float = 0.3) -> list[float]:
    """Return norms that scatter around a level, which is a function of the part of the warm-up that is over."""
    factors = (scatter * torch.randn(num, dtype=torch.float64)).exp().tolist()
    return [level(i / num) * factor for i, factor in enumerate(factors)]


@pytest.mark.parametrize("name", PRESETS)
def test_explosion_is_not_the_normal_level(name: str) -> None:
    preset, warmup = PRESETS[name]
    norms = scattered(lambda part: 1.0 if part < 0.3 else 50.0, warmup)
    clipper, bounds, caught = run(preset(), [*norms, 50.0, 50.0])
    assert len(caught) == 1
    assert f"step {warmup}" in str(caught[0])
    assert "cap=1.0" in str(caught[0])
    assert bounds[:warmup] == [float("inf")] * warmup
    assert 0.3 < bounds[warmup] < 5
    # The rule has started from the first norms alone. Only `ema` weighs them differently in a restart.
    _, expected, _ = run(preset(warmup=warmup // 4), [*norms[: warmup // 4], 50.0])
    assert bounds[warmup] == pytest.approx(expected[-1], rel=0.1 if name == "ema" else 1e-6)
    # It is loaded with its level, and without a second warning.
    again = GradClipper(nn.ModuleDict({"layer0": nn.Linear(1, 1, bias=False)}), preset())
    again.load_state_dict(clipper.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExplodedWarmupWarning)
        again.clip()


HEALTHY: dict[str, Callable[[float], float]] = {
    "steady": lambda part: 1.0,
    "falling": lambda part: 10 ** (-part),
    "rising with the learning rate": lambda part: 1 + 2 * part,
    "one spike": lambda part: 500.0 if 0.6 < part < 0.65 else 1.0,
    "large from the start": lambda part: 1e6,
    "small": lambda part: 1e-20,
}


@pytest.mark.parametrize("level", HEALTHY.values(), ids=HEALTHY)
@pytest.mark.parametrize("name", PRESETS)
def test_healthy_warmups_change_nothing(name: str, level: Callable[[float], float]) -> None:
    preset, warmup = PRESETS[name]
    norms = [*scattered(level, warmup), *scattered(lambda _: level(1.0), 10)]
    (_, watched, caught), (_, expected, _) = run(preset(), norms), run(preset(cap=1e30), norms)
    assert not caught
    assert [min(bound, 1e30) for bound in watched] == expected


@pytest.mark.parametrize(
    ("options", "has_alarm"),
    [({}, True), ({"cap": 1.0}, False), ({"warmup": 7}, False), ({"per": "tensor"}, False)],
    ids=["default", "cap", "short", "tensors"],
)
def test_only_warmups_without_a_limit_are_watched(options: dict[str, Any], has_alarm: bool) -> None:
    policy = distclip.zclip(**options)
    _, _, caught = run(policy, [1.0] * 6 + [50.0] * 20, num_layers=2)
    assert bool(caught) == has_alarm
    assert ("first_norms" in policy.init(1, torch.device("cpu"))) == has_alarm


@pytest.mark.parametrize(("before", "after"), [(float("inf"), 1.0), (1.0, float("inf"))])
def test_runs_resume_with_another_cap(before: float, after: float) -> None:
    clipper, _, _ = run(distclip.zclip(cap=before), [1.0] * 30)
    model = nn.ModuleDict({"layer0": nn.Linear(1, 1, bias=False)})
    resumed = GradClipper(model, distclip.zclip(cap=after))
    resumed.load_state_dict(clipper.state_dict())
    model["layer0"].weight.grad = torch.full((1, 1), 9.0)
    assert float(resumed.clip().bounds[0]) <= 1.01
