"""Parameters in one layout whose gradients every rank can make up by itself, step by step; and what to ask of them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distclip import GradClipper, NonFiniteWarning
from tests.ranks import everywhere
from tests.tables.layouts.data_parallel import mlp
from tests.tables.layouts.model_parallel import PLAN, Block, axis, known, made
from tests.tables.layouts.pipeline import plain
from tests.tables.layouts.tagged import tagged

NAN, INF = float("nan"), float("inf")


@dataclass
class Rig:
    """Parameters in one layout, whose gradients every rank can make up by itself.

    Args:
        named: of this rank.
        target: the parameter that gets bad elements.
        split_over: what is passed.
        place: along the axes where parameters differ; -1 where they do not.
        alike: gradients are the same on all ranks, so are bad elements.
    """

    named: list[tuple[str, nn.Parameter]]
    target: str
    split_over: Any = None
    place: int = -1
    alike: bool = False

    def key(self, name: str, param: Tensor) -> str:
        own = self.place >= 0 and (not isinstance(param, DTensor) or self.target.startswith("stage"))
        own = own and "copy" not in name
        return f"{name}@{self.place}" if own else name

    def lay(self, param: Tensor, whole: Tensor) -> Tensor:
        """This rank's part."""
        whole = whole.to(param.dtype)
        if isinstance(param, DTensor):
            return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
        return whole.clone()

    def fill(self, step: int, factor: float = 1.0) -> None:
        """The gradients of a step."""
        for name, param in self.named:
            param.grad = self.lay(param, made_up(self.key(name, param), param.shape, step) * factor)

    def poison(self, rank: int, *values: float) -> str:
        """Bad elements in the target's gradient on one rank; what is to be said of them."""
        here = self.alike or dist.get_rank() == rank
        if here:
            local(dict(self.named)[self.target].grad).view(-1)[: len(values)] = torch.tensor(values)
        nans = sum(value != value for value in values)
        counts = [f"{n} {kind}" for n, kind in ((nans, "NaN"), (len(values) - nans, "Inf")) if n]
        # Copies that nobody adds up are judged by each rank alone.
        return f"{self.target} ({' and '.join(counts)}{'' if self.alike else f' on rank {rank}'})"

    def gathered(self, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """By key, everything of the model once, in float64."""
        mine = {}
        for name, param in self.named:
            tensor = of(param)
            if tensor is not None:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                mine[self.key(name, param)] = whole.detach().double()
        return {key: value for rank in everywhere(mine) for key, value in rank.items()}

    def grads(self) -> list[Tensor]:
        return [local(param.grad) for _, param in self.named if param.grad is not None]

    def clipper(self, policy: Any, **options: Any) -> GradClipper:
        return GradClipper(self.named, policy, split_over=self.split_over, **options)

    def optimizer(self, kind: str, **options: Any) -> torch.optim.Optimizer:
        """torch's multi-tensor steps take DTensors and plain tensors in groups of their own only."""
        sharded = [p for _, p in self.named if isinstance(p, DTensor)]
        copied = [p for _, p in self.named if not isinstance(p, DTensor)]
        groups = [{"params": params} for params in (sharded, copied) if params]
        return KINDS[kind](groups, **options)


def made_up(key: str, shape: tuple[int, ...], step: int) -> Tensor:
    """A whole gradient, in float64, that every rank knows."""
    return known(*shape, seed=zlib.crc32(f"{key}/{step}".encode())).double()


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


def ddp() -> Rig:
    model = DistributedDataParallel(mlp(8, 6, 4))
    return Rig([(n.removeprefix("module."), p) for n, p in model.named_parameters()], "2.weight", alike=True)


def fsdp2() -> Rig:
    model = mlp(8, 6, 4)
    fully_shard(model)
    return Rig(list(model.named_parameters()), "2.weight")


def tp() -> Rig:
    """A plain replicated parameter comes first."""
    return Rig(list(parallelize_module(Block(), axis("tp"), PLAN).named_parameters()), "down.weight")


def megatron() -> Rig:
    weight = tagged(known(3, 4), tensor_model_parallel=True, partition_dim=0)
    named = [("copy", plain(known(5))), ("weight", weight)]
    return Rig(named, "weight", dist.group.WORLD, dist.get_rank())


def stages() -> Rig:
    mesh, rows = axis("pp"), 3 + dist.get_rank()
    return Rig([("bias", plain(known(rows))), ("weight", plain(known(rows, 4)))], "weight", mesh, dist.get_rank())


def experts() -> Rig:
    mesh = axis("ep")
    return Rig([("dense", made(known(8, 3), mesh, [Shard(0)])), ("expert", plain(known(3, 4)))], "expert", mesh, 0)


def stages_fsdp2() -> Rig:
    mesh = axis("pp", "dp")
    stage = nn.Module()
    stage.stage = mlp(8, 6 + 2 * mesh.get_local_rank("pp"), 8)
    fully_shard(stage, mesh=mesh["dp"])
    return Rig(list(stage.named_parameters()), "stage.2.weight", mesh["pp"], mesh.get_local_rank("pp"))


def build(name: str) -> Rig:
    rig = RIGS[name]()
    rig.place = dist.get_rank() if name == "experts" else rig.place
    return rig


RIGS = {f.__name__: f for f in (ddp, fsdp2, tp, megatron, stages, experts, stages_fsdp2)}
CASES = [(name, size) for name in RIGS for size in (2, 4) if size == 4 or name != "stages_fsdp2"]
everywhere_ = pytest.mark.parametrize(("name", "size"), CASES)


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensors: Any) -> list[bytes]:
    return [local(t).detach().contiguous().numpy().tobytes() for t in tensors]


def frozen(rig: Rig, *optimizers: torch.optim.Optimizer) -> list[bytes]:
    """Parameters, optimizer state and step counters, bit by bit."""
    states = [optimizer.state.get(p, {}) for optimizer in optimizers for _, p in rig.named]
    return bits([p for _, p in rig.named] + [value for state in states for value in state.values()])


def memory(clipper: GradClipper) -> list[bytes]:
    return bits(value for state in clipper.state_dict()["state"].values() for value in state.values())


def quietly(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and its NonFiniteWarnings; the same on every rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = call()
    assert all(warning.category is NonFiniteWarning for warning in caught), [str(w.message) for w in caught]
    said = [str(warning.message) for warning in caught]
    assert everywhere(said) == [said] * dist.get_world_size()
    return answer, said


def alike(clipper: GradClipper, *numbers: Any) -> None:
    """What the ranks of one clipper know is the same."""
    told = everywhere((clipper.incidents, clipper.skipped, *numbers))
    assert told == [told[0]] * len(told)
