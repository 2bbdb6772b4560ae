"""Steps of Megatron's optimizers beside one process that has the whole model in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distclip import GradClipper, LocalComm, Report, reference
from distclip.integrations.megatron import attach
from tests.integrations.megatron.model import (
    DTYPES,
    LR,
    Places,
    Setting,
    fill,
    key_of,
    made,
    megatron,
    optimizer_of,
    part_of,
    wholes,
)
from tests.ranks import everywhere

ROUNDED = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


class Truth:
    """The same training in one process: every parameter of the model once, in float64.

    Args:
        weights: at the start, by name.
        policy: what clips.
    """

    def __init__(self, weights: Mapping[str, Tensor], policy: Any) -> None:
        self.params = {key: nn.Parameter(weight.double()) for key, weight in weights.items()}
        self.optimizer = torch.optim.SGD(self.params.values(), lr=LR)
        self.clipper = GradClipper(list(self.params.items()), policy, comm=LocalComm())

    def step(self, grads: Mapping[str, Tensor]) -> Report:
        for key, param in self.params.items():
            param.grad = grads[key].double().clone()
        return self.clipper.step(self.optimizer)


def owned(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor, Tensor, slice]]:
    """(name, parameter, what of it is stepped here and in which precision, where that lies), as Megatron has it."""
    cut = {id(p): leaf for leaf in leaves_of(optimizer) for p in getattr(leaf, "model_param_gbuf_map", ())}
    distributed = any(hasattr(leaf, "model_param_gbuf_map") for leaf in leaves_of(optimizer))
    for name, param in model.module.named_parameters():
        if not param.requires_grad:
            continue
        here, own = slice(0, param.numel()), getattr(param, "main_param", param)
        if distributed:
            if id(param) not in cut:
                continue
            there = cut[id(param)]._get_model_param_range_map(param)["param"]
            here = slice(there.start, there.end)
            own = own if own is not param else own.detach().view(-1)[here]
        yield name, param, own.detach().view(-1), here


def leaves_of(optimizer: Any) -> list[Any]:
    return list(optimizer.chained_optimizers)


def alike(said: Any) -> list[Any]:
    """What all ranks say, which has to be the same."""
    told = everywhere(said)
    assert told == [told[0]] * len(told), told
    return told


def train(setting: Setting, policies: Sequence[Any], steps: int = 3) -> None:
    """Under each policy: norms, coefficients and parameters are those of one process, step after step."""
    with megatron(setting):
        for policy in policies:
            _train(setting, policy, steps)


def _train(setting: Setting, policy: Any, steps: int) -> None:
    def said(text: str) -> str:
        return f"{policy}: {text}"

    model, dtype = made(setting), DTYPES[setting.dtype]
    truth = Truth({key: (w * 0.1).to(dtype) for key, w in wholes(model, setting, "weights").items()}, policy)
    optimizer = optimizer_of(model, setting)
    attached = attach(optimizer, policy, model=[model])
    assert len(attached.clipper.slots) == len(truth.clipper.slots), said(str(attached.clipper.slots))
    for step in range(steps):
        # The last one is far out.
        what, factor = f"gradients {step}", 8.0 if step == steps - 1 else 1.0
        fill(model, setting, lambda name, grad, factor=factor: grad * factor, what)
        success, norm, _ = optimizer.step()
        grads = {key: grad.double() * factor for key, grad in wholes(model, setting, what).items()}
        right, report = truth.step(grads), attached.report
        assert success and report is not None
        true = float(reference.total_norm(grads.values(), policy.spec.norm_type))
        seen = [float(norm), float(report.norm), float(report.coef)]
        torch.testing.assert_close(seen, [true, true, float(right.coef)], rtol=1e-5, atol=0, msg=said)
        assert bool(report.clipped) == bool(right.clipped), policy
        alike((report.norm.numpy().tobytes(), report.coefs.numpy().tobytes()))
    check_weights(model, optimizer, setting, truth.params, said)


def check_weights(
    model: Any, optimizer: Any, setting: Setting, whole: Mapping[str, Tensor], said: Callable[[str], str] = str
) -> None:
    """What the optimizer steps here is this rank's part of `whole`, and the model has it in its own precision."""
    place, right = Places(), {}
    for name, param in model.module.named_parameters():
        mine = part_of(whole[key_of(name, place.pp, place.ep)].detach(), name, param, setting).float()
        right[name] = mine.reshape(-1)
        rounded = ROUNDED[setting.dtype]
        torch.testing.assert_close(param.detach().float(), mine, rtol=rounded, atol=rounded, msg=said)
    for name, _, own, here in owned(model, optimizer):
        torch.testing.assert_close(own, right[name][here], rtol=1e-5, atol=2e-5, msg=lambda m, n=name: said(n + m))
