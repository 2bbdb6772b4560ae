"""Group parameters by reference: Muon and AdamW, on one rank and on several, and groups that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW

import distclip
from distclip import ArgumentError, GradClipper, NormPolicy, reference
from tests.ranks import on_ranks

Muon = getattr(torch.optim, "Muon", SGD)
"""torch has it since 2.9."""


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def optimizers_of(model: nn.Module) -> dict[str, Any]:
    matrices = [param for param in model.parameters() if param.ndim == 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    return {"muon": Muon(matrices, lr=1e-3), "adamw": AdamW(vectors, lr=1e-3)}


def backward(model: nn.Module) -> None:
    torch.manual_seed(1)
    model(torch.randn(4, 8)).square().sum().backward()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def policies(optimizers: dict[str, Any]) -> list[NormPolicy]:
    muon, adamw = optimizers["muon"], optimizers["adamw"]
    return [
        distclip.group_norm({"adamw": (adamw, 0.01), "muon": (muon, math.inf)}),
        distclip.group_norm({"adamw": (adamw.param_groups[0], 0.01), "muon": {"pattern": muon, "max_norm": math.inf}}),
        NormPolicy(distclip.Fixed((0.01, math.inf)), per="group", groups={"adamw": adamw, "muon": muon}),
        NormPolicy(distclip.Fixed((0.01, math.inf)), per="group", groups=[adamw, muon]),
        distclip.group_norm({"adamw": (adamw, distclip.global_norm(0.01)), "muon": (muon, distclip.zclip())}),
    ]


@on_ranks(2)
@pytest.mark.parametrize("index", range(5))
def test_adamw_is_clipped_and_muon_is_measured(index: int) -> None:
    model = make_model()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizers = optimizers_of(model)
    clipper = GradClipper(model, policies(optimizers)[index])
    clipper.measure_tensors()
    assert [slot.lower() for slot in clipper.slots] == ["adamw", "muon"]
    backward(model)
    before = {name: whole(param.grad) for name, param in model.named_parameters()}
    report = clipper.clip()
    truth = [reference.total_norm([g for g in before.values() if (g.ndim == 2) == matrix]) for matrix in (False, True)]
    torch.testing.assert_close(report.norms, torch.stack(truth), rtol=1e-6, atol=0)
    assert report.bounds is not None
    assert report.bounds.tolist() == [0.01, math.inf]
    for name, param in model.named_parameters():
        coef = 1.0 if before[name].ndim == 2 else 0.01 / float(truth[0])
        torch.testing.assert_close(whole(param.grad), before[name] * coef, rtol=1e-5, atol=1e-9)
    # Both in one step.
    clipper.step(list(optimizers.values()))


def test_frozen_parameters_need_no_group() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    head = AdamW(model[2].parameters())
    clipper = GradClipper(model, NormPolicy(per="group", groups=[head]))
    backward(model)
    assert float(clipper.clip().norms[0]) > 1
    assert clipper.slots == ("AdamW",)


_WRONG: dict[str, tuple[Callable[[nn.Module, dict[str, Any]], Any], str]] = {
    "missing": (lambda m, o: {"adamw": o["adamw"]}, "no group has 0.weight, 2.weight"),
    "overlap": (lambda m, o: {**o, "head": m[2]}, "2.bias is in 'adamw' and in 'head'"),
    "nothing": (lambda m, o: {**o, "sgd": SGD([nn.Parameter(torch.ones(1))])}, "the clipper has none of them"),
    "number": (lambda m, o: {"adamw": 3}, "regular expressions or optimizers"),
    "tensor": (lambda m, o: {"adamw": m[0].weight}, "regular expressions or optimizers"),
}


@on_ranks(2)
@pytest.mark.parametrize("case", _WRONG)
def test_groups_that_do_not_fit_are_refused_on_all_ranks(case: str) -> None:
    groups, message = _WRONG[case]
    model = make_model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    with pytest.raises(ArgumentError, match=message):
        GradClipper(model, NormPolicy(per="group", groups=groups(model, optimizers_of(model))))


@pytest.mark.parametrize("clears", [True, False])
def test_two_networks_in_turn_are_clipped_by_what_they_own(clears: bool) -> None:
    """The loss of the generator makes gradients of the discriminator too, which are not stepped in that turn."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(3, 3), nn.Linear(3, 1)
    for net in (generator, discriminator):
        nn.init.constant_(net.weight, 1.0)
    steps = {"d": SGD(discriminator.parameters(), lr=1.0), "g": SGD(generator.parameters(), lr=1.0)}
    both = [(f"g.{n}", p) for n, p in generator.named_parameters()]
    both += [(f"d.{n}", p) for n, p in discriminator.named_parameters()]
    GradClipper(both, distclip.global_norm(1.0)).attach(*steps.values())

    def step(turn: str, loss: Tensor) -> float:
        steps[turn].zero_grad(set_to_none=clears)
        loss.backward()
        params = [p for group in steps[turn].param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        steps[turn].step()
        return float(reference.total_norm([old - new.detach() for old, new in zip(before, params, strict=True)]))

    noise, real = torch.ones(2, 3), torch.full((2, 3), 5.0)
    for _ in range(3):
        fake = generator(noise)
        assert step("d", 100 * (discriminator(fake.detach()) - discriminator(real)).sum()) == pytest.approx(1, rel=1e-4)
        assert step("g", -100 * discriminator(generator(noise)).sum()) == pytest.approx(1, rel=1e-4)
