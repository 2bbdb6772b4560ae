"""Steps of an engine beside the same training in one process, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import GradClipper, LocalComm, global_norm, per_tensor_norm
from distclip.integrations.deepspeed import attach
from distclip.reference import total_norm
from tests.integrations.deepspeed.engines import (
    DTYPES,
    Setting,
    Uneven,
    backward,
    engine_of,
    masters,
    micro,
    reduced,
    sgd,
)
from tests.ranks import everywhere


class Truth:
    """The same training in one process: float64 gradients at parameters as the engine rounds them."""

    def __init__(self, model: nn.Module, policy: Any, dtype: torch.dtype, optimizer: Callable[[Any], Any]) -> None:
        self.model, self.dtype = copy.deepcopy(model).double(), dtype
        with torch.no_grad():
            for param in self.model.parameters():
                # DeepSpeed starts from what the model has in its own precision.
                param.copy_(param.to(dtype))
        self.optimizer = optimizer([{"params": list(self.model.parameters())}])
        self.clipper = GradClipper(self.model, policy, comm=LocalComm())

    def step(self, x: Tensor, y: Tensor) -> Any:
        self.optimizer.zero_grad()
        rounded = {n: p.detach().to(self.dtype).double().requires_grad_() for n, p in self.model.named_parameters()}
        loss = (torch.func.functional_call(self.model, rounded, (x.double(),)) - y.double()).square().mean()
        grads = torch.autograd.grad(loss, list(rounded.values()), allow_unused=True)
        for param, grad in zip(self.model.parameters(), grads, strict=True):
            # DeepSpeed fills in zeros.
            param.grad = torch.zeros_like(param) if grad is None else grad
        return self.clipper.step(self.optimizer)

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: param.detach() for name, param in self.model.named_parameters()}


def batches(steps: int, ga: int) -> list[tuple[Tensor, Tensor]]:
    """Global batches that every rank knows: two rows for each rank and micro-batch; some are far out."""
    generator = torch.Generator().manual_seed(1)
    rows = 2 * ga * dist.get_world_size()
    made = [[torch.randn(rows, n, generator=generator) for n in (13, 3)] for _ in range(steps)]
    return [(x, y * (8.0 if i == steps - 2 else 1.0)) for i, (x, y) in enumerate(made)]


def differ(got: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far the updates are apart, relative to all of them."""
    assert list(got) == list(want)
    off = torch.cat([(got[n] - want[n]).flatten() for n in got]).norm()
    return float(off / torch.cat([(want[n] - start[n]).flatten() for n in got]).norm())


def train(setting: Setting, policy: Any, steps: int = 5, model: Callable[[], nn.Module] = Uneven) -> None:
    """Steps of an engine are those of one process on the global batch: norms, coefficients, parameters."""
    torch.manual_seed(0)
    module, dtype = model(), DTYPES[setting.dtype]
    truth = Truth(module, policy, dtype, sgd)
    start = {name: param.clone() for name, param in truth.params.items()}
    engine = engine_of(module, setting, sgd)
    attached = attach(engine, policy)
    for step, (x, y) in enumerate(batches(steps, setting.ga)):
        for mine in micro(x, y, setting.ga):
            backward(engine, *mine, dtype)
            engine.step()
        right, report = truth.step(x, y), attached.report
        seen = torch.stack([report.norm.double(), report.coef.double(), torch.as_tensor(engine.get_global_grad_norm())])
        want = torch.stack([right.norm.double(), right.coef.double(), right.norm.double()])
        torch.testing.assert_close(
            seen, want, rtol=setting.tolerance, atol=0, check_dtype=False, msg=lambda m, s=step: f"step {s}: {m}"
        )
        assert bool(report.clipped) == bool(right.clipped), f"step {step}"
        told = everywhere((report.norm.numpy().tobytes(), report.coefs.numpy().tobytes()))
        assert told == [told[0]] * len(told), "the ranks do not have the same bits"
    off = differ(masters(engine), truth.params, start)
    assert off < setting.tolerance, f"parameters are off by {off:.1e} of the way they went"
    assert engine.skipped_steps == 0


def growth(setting: Setting, scaled_already: bool = False) -> None:
    """float16 at constant gradients of norm 2: a step at which the loss scale grows is a step like any other."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    setting.top.update({"fp16": {"enabled": True, "loss_scale_window": 2}})
    engine = engine_of(model, setting, lambda groups: torch.optim.SGD(groups, lr=1.0))
    if scaled_already:
        its_own = engine.backward
        engine.backward = lambda loss, **options: its_own(loss * engine.optimizer.loss_scale, **options)
    attached = attach(engine, global_norm(100.0))
    scales = []
    for k in range(6):
        engine.backward(engine(torch.ones(1, 4).half()).float().sum())
        scales.append(attached._adapter.loss_scale)
        engine.step()
        weight = next(iter(masters(engine).values()))
        torch.testing.assert_close(weight, torch.full((1, 4), -k - 1.0, dtype=torch.float64))
        assert float(engine.get_global_grad_norm()) == 2.0
    assert len(set(scales)) > 2, scales


def missing(setting: Setting) -> None:
    """Stage 0, and a rank that has no gradient of the first layers."""
    torch.manual_seed(0)
    module = Uneven()
    engine = engine_of(module, setting, sgd)
    attached = attach(engine, per_tensor_norm(0.1))
    module.reaches_first = dist.get_rank() != 0
    backward(engine, torch.ones(2, 13), torch.ones(2, 3), DTYPES[setting.dtype])
    scale = attached._adapter.loss_scale or 1.0
    truth = total_norm(grad / scale for grad in reduced(engine).values())
    engine.step()
    torch.testing.assert_close(attached.report.norm.double(), truth, rtol=1e-6, atol=0)
