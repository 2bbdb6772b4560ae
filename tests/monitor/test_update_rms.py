"""Ratios of gradients to Adam's second moments, in layouts, against the formula on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ArgumentError
from distclip.monitor import UpdateRms
from tests.ranks import on_ranks

BETA = 0.95


def expected_ratios(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of g²/v by name for the last gradients, with v of those before."""
    ratios = {}
    for name, last in gradients[-1].items():
        moment = torch.zeros_like(last, dtype=torch.float64)
        for one in gradients[:-1]:
            moment = BETA * moment + (1 - BETA) * one[name].double().square()
        moment = moment / (1 - BETA ** (len(gradients) - 1))
        ratios[name] = (last.double().square() / moment).nan_to_num(0.0).mean()
    return ratios


@on_ranks(2)
@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2"])
def test_layouts(layout: str) -> None:
    torch.manual_seed(0)
    reference, model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model.load_state_dict(reference.state_dict())
    wrapped: nn.Module = model
    if layout == "ddp":
        wrapped = DistributedDataParallel(model)
    elif layout == "fsdp2":
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    clipper = distclip.GradClipper(wrapped, distclip.global_norm(1e6))
    clipper.measure_tensors()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.0, betas=(0.9, BETA))
    update = UpdateRms(clipper, optimizer)
    gradients: list[dict[str, Tensor]] = []
    for step in range(4):
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)) * (20 if step == 3 else 1)
        for module in (reference, wrapped):
            module.zero_grad()
            module(inputs).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None})
        update.measure()
        assert math.isnan(update.rms) == (step == 0)
        clipper.step(optimizer)
    ratios = expected_ratios(gradients)
    for name, rms in update.by_name.items():
        plain = name.removeprefix("module.")
        torch.testing.assert_close(rms.square(), ratios.pop(plain), rtol=1e-4, atol=0)
    assert not ratios
    total = sum(expected_ratios(gradients)[n] * g.numel() for n, g in gradients[-1].items())
    count = sum(g.numel() for g in gradients[-1].values())
    torch.testing.assert_close(update.rms.square(), total / count, rtol=1e-4, atol=0)
    assert float(update.rms) > 5


def test_loss_scale() -> None:
    weight = nn.Parameter(torch.ones(3))
    clipper = distclip.GradClipper([("weight", weight)], distclip.global_norm(1e9))
    optimizer = torch.optim.Adam([weight])
    update = UpdateRms(clipper, optimizer)
    weight.grad = torch.ones(3)
    clipper.step(optimizer)
    weight.grad = torch.full((3,), 3.0 * 1024)
    update.measure(torch.tensor(1024.0))
    assert float(update.by_name["model"]) == pytest.approx(3.0)


class OneBeta(torch.optim.Adam):
    """Adam with the names that Adafactor has in its groups."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["beta1"] = group.pop("betas")[0]


def test_optimizers_of_other_libraries_are_measured_from_their_first_step_on() -> None:
    """Measure an optimizer that has no second moments yet, and names their decay otherwise than Adam."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    update = UpdateRms(distclip.GradClipper([weight], distclip.global_norm(1.0)), OneBeta([weight]))
    update.measure()
    assert math.isnan(float(update.rms))


def test_invalid_arguments() -> None:
    weight = nn.Parameter(torch.ones(3))
    clipper = distclip.GradClipper([weight], distclip.global_norm(1.0))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    with pytest.raises(ArgumentError, match="clipper="):
        UpdateRms(weight, optimizer)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="optimizer=3"):
        UpdateRms(clipper, 3)  # type: ignore[arg-type]
    weight.grad = torch.ones(3)
    for sgd in (optimizer, torch.optim.SGD([weight])):
        with pytest.raises(ArgumentError, match="SGD has no second moments"):
            UpdateRms(clipper, sgd).measure()
