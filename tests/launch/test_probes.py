"""Test the probes on steps with known results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distclip import Fixed, GradClipper, NormPolicy, Policy, global_norm, value
from job.models import cliff
from job.probes import landscape
from job.probes.angle import Angle, degrees
from job.probes.cliff import Descent
from job.probes.recovery import Recovery, steps_to_recover

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.0], [0.0, 2.0], 90.0),
        ([1.0, 0.0], [3.0, 3.0], 45.0),
        ([1.0, 2.0], [-2.0, -4.0], 180.0),
        ([1.0, 0.0], [1.0, 1e-7], math.degrees(1e-7)),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [1.0, 0.0], math.nan),
        ([math.inf, 0.0], [1.0, 0.0], math.nan),
    ],
)
def test_degrees(a: list[float], b: list[float], expected: float) -> None:
    angle = degrees(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert angle == pytest.approx(expected, rel=1e-9, nan_ok=True)


def angle_of_step(policy: Policy) -> float:
    """Return the angle by which a policy turns the gradient (3, 4) of two parameters."""
    model = nn.Linear(1, 1)
    clipper, optimizer, probe = GradClipper(model, policy), torch.optim.SGD(model.parameters(), 0.1), Angle()
    probe.start(model)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    probe.before_clipping()
    row = probe.after_step(clipper.step(optimizer))
    metrics = {metric.name: metric.value for metric in probe.finish([row], Path())}
    assert metrics == {"angle_mean": row["angle"], "angle_max": row["angle"]}
    return row["angle"]


def test_only_clipping_by_value_turns_the_gradient() -> None:
    assert angle_of_step(value(1.0)) == pytest.approx(math.degrees(math.atan2(4, 3)) - 45)
    assert angle_of_step(value(5.0)) == 0.0
    assert angle_of_step(global_norm(math.inf)) == 0.0
    # Rounding turns the gradient a little.
    assert angle_of_step(global_norm(1.0)) < 1e-5


@pytest.mark.parametrize(
    ("losses", "usual", "expected"),
    [
        # The mean of 7 and the next four is too large.
        ([9, 8, 7, 1, 1, 1, 1, 1, 9], 2, 3),
        # One low loss by chance does not count.
        ([9, 1, 9, 9, 1, 1, 1, 1, 1], 2, 4),
        ([9, math.nan, 1, 1, 1, 1, 1], 2, 2),
        ([3, 3, 3, 3, 3, 3], 2, math.inf),
        ([1], 2, math.inf),
    ],
)
def test_steps_to_recover(losses: list[float], usual: float, expected: float) -> None:
    assert steps_to_recover(losses, usual) == expected


def test_recovery_compares_losses_before_and_after_a_step() -> None:
    losses = [2.0] * 30 + [50.0, 10.0] + [1.0] * 20
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    metrics = {metric.name: metric.value for metric in Recovery(30).finish(rows, Path())}
    assert metrics == {"loss_before": 2.0, "loss_after": 50.0, "recovery": 2}
    assert math.isnan(Recovery(1).finish([], Path())[0].value)


def test_cliff_is_the_network_of_the_paper() -> None:
    without_weight = cliff.output(torch.tensor([[0.0, 1.5]]))
    torch.testing.assert_close(without_weight, torch.sigmoid(torch.tensor([1.5])))
    x = torch.tensor(0.5)
    for _ in range(50):
        x = 5 * torch.sigmoid(x) - 2.5
    torch.testing.assert_close(cliff.output(torch.tensor([5.0, -2.5])), torch.sigmoid(x))


def descend(directory: Path, policy: Policy, *starts: list[float]) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the points after ten steps and the metrics."""
    model = cliff.Cliff(torch.tensor(starts, dtype=torch.float64))
    clipper, optimizer = GradClipper(model, policy), torch.optim.SGD(model.parameters(), 1.0)
    probe = Descent(paths=1)
    probe.start(model)
    for _ in range(10):
        optimizer.zero_grad()
        cliff.sum_of_squared_errors(model(torch.zeros(1)), torch.tensor(cliff.TARGET)).backward()
        probe.before_clipping()
        probe.after_step(clipper.step(optimizer))
    return model.starts.detach(), {metric.name: metric.value for metric in probe.finish([], directory)}


def test_every_start_is_clipped_separately(tmp_path: Path) -> None:
    policy = NormPolicy(Fixed(0.1), per="row")
    steep, flat = [5.2, -2.6], [3.0, -1.0]
    points, metrics = descend(tmp_path, policy, steep, flat)
    torch.testing.assert_close(points, torch.cat([descend(tmp_path, policy, start)[0] for start in (steep, flat)]))
    assert 0 < metrics["clipped_starts"] < 1
    assert metrics["thrown"] == 0
    assert metrics["moved_max"] <= 1
    assert json.loads((tmp_path / "figures/cliff.json").read_text())["data"]


def test_figure_shows_paths_on_the_loss(tmp_path: Path) -> None:
    paths = torch.tensor([[[5.0, -2.0], [5.5, -2.5]], [[4.0, -1.0], [4.0, -9.0]]])
    landscape.write(tmp_path / "figures" / "cliff.json", paths)
    figure = json.loads((tmp_path / "figures" / "cliff.json").read_text(encoding="utf-8"))
    contour, *lines = figure["data"]
    assert contour["type"] == "contour"
    assert len(contour["z"]) == len(contour["y"])
    assert [line["x"] for line in lines[::2]] == [[5.0, 5.5], [4.0, 4.0]]
    assert [line["y"] for line in lines[1::2]] == [[-2.5], [-9.0]]


def test_prints_a_hint_without_plotly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    landscape.write(tmp_path / "cliff.json", torch.zeros(1, 2, 2))
    assert capsys.readouterr().out == "cliff.json is not written because plotly is missing: pip install plotly\n"
    assert not list(tmp_path.iterdir())
