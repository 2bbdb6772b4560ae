"""The loop that the others are compared with: one process, float64, the whole batch."""

from __future__ import annotations

import copy
import inspect
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distclip
from tests.ranks import everywhere

STEPS, ROWS = 5, 2
"""Of a run; of one rank in a micro-batch."""

POLICIES = {
    "model": distclip.global_norm(0.5),
    "tensor": distclip.per_tensor_norm(0.2),
    "adaptive": distclip.zclip(cap=1.0, warmup=1),
}


class Net(nn.Module):
    """Rows that two ranks cannot share out evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """In the order in which ranks read them a step has a stretch of its own; those of the third are far out."""

    def __init__(self, ga: int = 1, steps: int = STEPS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.per_step = ROWS * ga * dist.get_world_size()
        self.x = torch.randn(steps * self.per_step, 6, generator=generator)
        self.y = torch.randn(steps * self.per_step, 3, generator=generator)
        self.y[2 * self.per_step : 3 * self.per_step] *= 20

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.per_step), self.y.split(self.per_step), strict=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def mse(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean()


def truth(policy: Any, ga: int = 1, optimizer: Callable[[Any], Any] = sgd) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters after the run, and the norm of each step."""
    model = copy.deepcopy(net()).double()
    steps = optimizer(model.parameters())
    clipper = distclip.GradClipper(model, policy, comm=distclip.LocalComm())
    norms = []
    for x, y in Samples(ga).steps():
        steps.zero_grad()
        mse(model(x.double()), y.double()).backward()
        norms.append(float(clipper.step(steps).norm))
    return {name: param.detach() for name, param in model.named_parameters()}, norms


def agree(
    params: dict[str, Tensor], norms: list[float], policy: Any, ga: int = 1, *, fp16: bool = False, **options: Any
) -> None:
    """The run of a framework came to what the plain loop comes to; float16 to about that."""
    expected, of_steps = truth(policy, ga, **options)
    rtol, atol = (0.05, 0.02) if fp16 else (1e-5, 1e-6)
    assert any(norm > 2 * min(of_steps) for norm in of_steps), of_steps
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(of_steps), rtol=rtol, atol=atol)
    for name, param in expected.items():
        torch.testing.assert_close(params[name].double(), param, rtol=rtol, atol=atol)
    start = dict(net().named_parameters())
    assert any((start[name] - param).abs().max() > 0.02 for name, param in expected.items())


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model in full, by its bare name; call it on every rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def full(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    if any(isinstance(module, FSDP) for module in model.modules()):
        with FSDP.summon_full_params(model):
            return {name: full(param) for name, param in bare(model)}
    return {name: full(param) for name, param in bare(model)}


def bare(model: nn.Module) -> list[tuple[str, Tensor]]:
    for inside in ("_fsdp_wrapped_module.", "module.", "_forward_module.", "net."):
        if all(name.startswith(inside) for name, _ in model.named_parameters()):
            return [(n.replace(inside, "").replace("net.", ""), p) for n, p in model.named_parameters()]
    return list(model.named_parameters())


def poison(model: nn.Module, rank: int | None = 1, value: float = float("nan")) -> None:
    """A bad element in one rank's piece of a gradient; None for all ranks: what DDP makes of one rank's."""
    for param in model.parameters():
        grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        if rank in (None, dist.get_rank()) and grad is not None and grad.numel():
            grad.view(-1)[0] = value
            return


def alike(*numbers: Any) -> None:
    told = everywhere(numbers)
    assert all(repr(other) == repr(told[0]) for other in told), told


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@contextmanager
def among_others() -> Iterator[list[warnings.WarningMessage]]:
    """Frameworks warn of much; what distclip says is caught here."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="none", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def example(of: Any) -> str:
    """The code block of a docstring."""
    block: list[str] = []
    lines = (inspect.getdoc(of) or "").split("::\n\n")[1].split("\n")
    for line in lines:
        if line and not line.startswith(" "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block))
