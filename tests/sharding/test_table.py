"""What a step of sharded parameters costs beside the reading: counted, since noise cannot touch a count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import reference
from distclip.bench.race import Options
from distclip.bench.sharded import tiny
from distclip.sharding.shard import ShardInfos
from tests.ranks import World
from tests.sharding.test_cache import Operators


class OfDTensors(Operators):
    """Counts beside all operators those of DTensors."""

    of_dtensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(issubclass(kind, DTensor) for kind in types):
            self.of_dtensors += 1
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def backward(model: nn.Module) -> None:
    model(torch.ones(8, model.width)).square().sum().backward()


def check_costs(tensor_parallel: bool) -> None:
    counts = []
    for number in (8, 80):
        model = tiny(Options(), number, tensor_parallel)
        clipper = distclip.GradClipper(model, distclip.global_norm(1e9))
        for call in (clipper.clip, lambda model=model: distclip.clip_grad_norm_(model.parameters(), 1e9)):
            call()
            with OfDTensors() as operators, CommDebugMode() as collectives:
                call()
            assert operators.of_dtensors == 0
            assert collectives.get_total_counts() == 1
            counts.append(operators.count)
    assert counts[:2] == counts[2:], "operators grow with the number of parameters"


@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_costs(world: Callable[[int], World], tensor_parallel: bool) -> None:
    world(4).run(check_costs, tensor_parallel=tensor_parallel)


def check_planned_once(tensor_parallel: bool) -> None:
    """New gradients, of DTensors too, do not make places be worked out again."""
    model = tiny(Options(), 8, tensor_parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = distclip.GradClipper(model, distclip.global_norm(0.1))
    made: list[int] = []
    real = ShardInfos.__new__
    ShardInfos.__new__ = lambda cls, *args: made.append(1) or real(cls, *args)  # type: ignore[assignment]
    try:
        for step in range(4):
            backward(model)
            whole = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
            report = clipper.step(optimizer)
            torch.testing.assert_close(report.norm.double(), reference.total_norm(whole), rtol=1e-6, atol=0)
            optimizer.zero_grad()
            if step == 0:
                seen = len(made)
    finally:
        ShardInfos.__new__ = real  # type: ignore[method-assign]
    assert len(made) == seen


@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_planned_once(world: Callable[[int], World], tensor_parallel: bool) -> None:
    world(4).run(check_planned_once, tensor_parallel=tensor_parallel)


def check_flat_grads() -> None:
    """Local pieces of sharded gradients in one storage: the same steps, and DTensors as before."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for model in models:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    clippers = [distclip.GradClipper(m, distclip.global_norm(0.5), flat_grads=i == 0) for i, m in enumerate(models)]
    for step in range(4):
        for model, optimizer, clipper in zip(models, optimizers, clippers, strict=True):
            model(torch.full((2, 8), 1.0 + step)).square().sum().backward()
            clipper.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
    assert all(isinstance(p.grad, DTensor) for p in models[0].parameters() if isinstance(p, DTensor))
    found = clippers[0]._judge.plan.shards(2)
    # Pieces and copies, which count differently, apart.
    assert found.merged is not None and len(found.merged) == 2
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in (one, other)]
        torch.testing.assert_close(*local, rtol=1e-6, atol=1e-7)


def test_flat_grads(world: Callable[[int], World]) -> None:
    world(2).run(check_flat_grads)
