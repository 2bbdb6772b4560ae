"""Train in one process, in float64, on the global batch: the loop that frameworks are compared with."""

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
from tests.ranks import gather_from_ranks

NUM_STEPS, NUM_ROWS = 5, 2
"""Steps of a run, and samples of one rank in a micro-batch."""

OUTLIER = 2
"""Step whose targets are twenty times as large."""

POLICIES = {
    "model": distclip.global_norm(0.5),
    "tensor": distclip.per_tensor_norm(0.2),
    "adaptive": distclip.zclip(cap=1.0, warmup=1),
}
SKIPPING = distclip.median_mad(k=10, window=8, warmup=2, skip=True)
"""A policy that skips the outlier."""


class Net(nn.Module):
    """Two layers whose rows do not divide evenly between two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def build_net() -> Net:
    torch.manual_seed(0)
    return Net()


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples in the order in which the ranks read them, so that each step has a contiguous range."""

    def __init__(self, num_micro_batches: int = 1, num_steps: int = NUM_STEPS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.per_step = NUM_ROWS * num_micro_batches * dist.get_world_size()
        self.x = torch.randn(num_steps * self.per_step, 6, generator=generator)
        self.y = torch.randn(num_steps * self.per_step, 3, generator=generator)
        self.y[OUTLIER * self.per_step : (OUTLIER + 1) * self.per_step] *= 20

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]

    def by_step(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.per_step), self.y.split(self.per_step), strict=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def mse(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean()


def train_in_one_process(
    policy: Any, num_micro_batches: int = 1, optimizer: Callable[[Any], Any] = sgd
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the parameters after the run, and the norm of each step."""
    model = copy.deepcopy(build_net()).double()
    stepper = optimizer(model.parameters())
    clipper = distclip.GradClipper(model, policy, comm=distclip.LocalComm())
    norms = []
    for x, y in Samples(num_micro_batches).by_step():
        stepper.zero_grad()
        mse(model(x.double()), y.double()).backward()
        norms.append(float(clipper.step(stepper).norm))
    return {name: param.detach() for name, param in model.named_parameters()}, norms


def check_run(
    params: dict[str, Tensor],
    norms: list[float],
    policy: Any,
    num_micro_batches: int = 1,
    *,
    fp16: bool = False,
    **options: Any,
) -> None:
    """Check parameters and norms of a framework's run against one process, in float16 with a wide tolerance."""
    expected_params, expected_norms = train_in_one_process(policy, num_micro_batches, **options)
    rtol, atol = (0.05, 0.02) if fp16 else (1e-5, 1e-6)
    # Otherwise nothing would be clipped.
    assert any(norm > 2 * min(expected_norms) for norm in expected_norms), expected_norms
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms), rtol=rtol, atol=atol)
    for name, param in expected_params.items():
        torch.testing.assert_close(params[name].double(), param, rtol=rtol, atol=atol)
    start = dict(build_net().named_parameters())
    assert any((start[name] - param).abs().max() > 0.02 for name, param in expected_params.items())


def full_params(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter of a model in full, by its bare name. Call it on every rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    def full(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    if any(isinstance(module, FSDP) for module in model.modules()):
        with FSDP.summon_full_params(model):
            return {name: full(param) for name, param in bare_params(model)}
    return {name: full(param) for name, param in bare_params(model)}


def bare_params(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters with their names in the bare model, without the prefixes of wrappers."""
    for prefix in ("_fsdp_wrapped_module.", "module.", "_forward_module.", "net."):
        if all(name.startswith(prefix) for name, _ in model.named_parameters()):
            return [(n.replace(prefix, "").replace("net.", ""), p) for n, p in model.named_parameters()]
    return list(model.named_parameters())


def poison(model: nn.Module, rank: int | None = 1, value: float = float("nan")) -> None:
    """Overwrite one element of one rank's piece of a gradient. None for all ranks, as DDP spreads a bad element."""
    for param in model.parameters():
        grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        if rank in (None, dist.get_rank()) and grad is not None and grad.numel():
            grad.view(-1)[0] = value
            return


def check_equal_on_ranks(*values: Any) -> None:
    """Check that every rank has the same values."""
    by_rank = gather_from_ranks(values)
    assert all(repr(other) == repr(by_rank[0]) for other in by_rank)


def bitwise_equal(left: Any, right: Any) -> bool:
    """Compare tensors bit by bit, through dictionaries and lists."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(bitwise_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(bitwise_equal, left, right))
    return bool(left == right)


@contextmanager
def framework_environment() -> Iterator[list[warnings.WarningMessage]]:
    """Set the environment of a launcher, and record warnings instead of raising the frameworks' own."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="none", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def error_of(call: Callable[[], Any]) -> str:
    """Return "Class: message" of the exception that a call raises, or "" without one."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def example_in(documented: Any) -> str:
    """Return the code block of a docstring."""
    block: list[str] = []
    lines = (inspect.getdoc(documented) or "").split("::\n\n")[1].split("\n")
    for line in lines:
        if line and not line.startswith(" "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block))
