"""What looks on while our own job trains, on steps whose answers are known."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import cliff
import landscape
import train
from angle import Angle, degrees
from distclip import Fixed, GradClipper, NormPolicy, Policy, global_norm, value
from recovery import Recovery, recovery

CONF = Path(__file__).parents[2] / "conf"


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
    measured = degrees(*(torch.tensor(each, dtype=torch.float64) for each in (a, b)))
    assert measured == pytest.approx(expected, rel=1e-9, nan_ok=True)


def turned(policy: Policy) -> float:
    """By how much a step with the gradient (3, 4), in two parameters, is turned."""
    model = nn.Linear(1, 1)
    clipper, optimizer, probe = GradClipper(model, policy), torch.optim.SGD(model.parameters(), 0.1), Angle()
    probe.watch(model)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    probe.before()
    row = probe.after(clipper.step(optimizer))
    assert {each.name: each.value for each in probe.close([row], Path())} == {
        "angle_mean": row["angle"],
        "angle_max": row["angle"],
    }
    return row["angle"]


def test_only_clipping_by_value_turns() -> None:
    assert turned(value(1.0)) == pytest.approx(math.degrees(math.atan2(4, 3)) - 45)
    assert turned(value(5.0)) == 0.0
    assert turned(global_norm(math.inf)) == 0.0
    assert turned(global_norm(1.0)) < 1e-5  # rounding


def test_an_angle_needs_whole_gradients() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["probe=angle", "parallel=fsdp2", "model=mlp", "data=digits"])
    with pytest.raises(SystemExit, match=r"probe=angle looks at whole gradients.*write parallel=ddp"):
        train.build(cfg)


def test_recovery() -> None:
    assert recovery([9, 8, 7, 1, 1, 1, 1, 1, 9], 2) == 3  # 7 is still too much for the next five
    assert recovery([9, 1, 9, 9, 1, 1, 1, 1, 1], 2) == 4  # one that is low by chance is not it
    assert recovery([9, math.nan, 1, 1, 1, 1, 1], 2) == 2
    assert recovery([3, 3, 3, 3, 3, 3], 2) == math.inf
    assert recovery([1], 2) == math.inf


def test_recovery_compares_what_comes_after_the_step_with_what_was_before() -> None:
    losses = [2.0] * 30 + [50.0, 10.0] + [1.0] * 20
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    measured = {each.name: each.value for each in Recovery(30).close(rows, Path())}
    assert measured == {"loss_before": 2.0, "loss_after": 50.0, "recovery": 2}
    assert math.isnan(Recovery(1).close([], Path())[0].value)


def test_the_cliff_is_as_in_the_paper() -> None:
    no_weight = cliff.output(torch.tensor([[0.0, 1.5]]))
    torch.testing.assert_close(no_weight, torch.sigmoid(torch.tensor([1.5])))
    x = torch.tensor(0.5)
    for _ in range(50):
        x = 5 * torch.sigmoid(x) - 2.5
    torch.testing.assert_close(cliff.output(torch.tensor([5.0, -2.5])), torch.sigmoid(x))


def descended(directory: Path, policy: Policy, *starts: list[float]) -> tuple[torch.Tensor, dict[str, float]]:
    """Where ten steps from there end."""
    model = cliff.Cliff(torch.tensor(starts, dtype=torch.float64))
    clipper, optimizer = GradClipper(model, policy), torch.optim.SGD(model.parameters(), 1.0)
    probe = cliff.Descent(paths=1)
    probe.watch(model)
    for _ in range(10):
        optimizer.zero_grad()
        cliff.total_error(model(torch.zeros(1)), torch.tensor(cliff.TARGET)).backward()
        probe.before()
        probe.after(clipper.step(optimizer))
    return model.starts.detach(), {each.name: each.value for each in probe.close([], directory)}


def test_every_start_is_clipped_on_its_own(tmp_path: Path) -> None:
    policy = NormPolicy(Fixed(0.1), per="row")
    steep, flat = [5.2, -2.6], [3.0, -1.0]
    both, measured = descended(tmp_path, policy, steep, flat)
    torch.testing.assert_close(both, torch.cat([descended(tmp_path, policy, each)[0] for each in (steep, flat)]))
    assert 0 < measured["clipped_starts"] < 1
    assert measured["thrown"] == 0 and measured["moved_max"] <= 1
    assert json.loads((tmp_path / "figures/cliff.json").read_text())["data"]


def test_the_picture_shows_the_paths_beside_the_loss(tmp_path: Path) -> None:
    paths = torch.tensor([[[5.0, -2.0], [5.5, -2.5]], [[4.0, -1.0], [4.0, -9.0]]])
    landscape.write(tmp_path / "figures" / "cliff.json", paths)
    figure = json.loads((tmp_path / "figures" / "cliff.json").read_text(encoding="utf-8"))
    contour, *lines = figure["data"]
    assert contour["type"] == "contour" and len(contour["z"]) == len(contour["y"])
    assert [line["x"] for line in lines[::2]] == [[5.0, 5.5], [4.0, 4.0]]
    assert [line["y"] for line in lines[1::2]] == [[-2.5], [-9.0]]


def test_without_plotly_a_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    landscape.write(tmp_path / "cliff.json", torch.zeros(1, 2, 2))
    assert capsys.readouterr().out == "cliff.json is left out, which takes plotly: pip install plotly\n"
    assert not list(tmp_path.iterdir())
