"""Train parameters in one layout with gradients that every rank can compute by itself, and compare ranks."""

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
from tests.ranks import gather_from_ranks
from tests.tables.layouts.data_parallel import mlp
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.model_parallel import PLAN, Block, dtensor_param, random_grad
from tests.tables.layouts.pipeline import plain_param
from tests.tables.layouts.tagged import tagged_param
from tests.tables.optimizers import OPTIMIZERS

NAN, INF = float("nan"), float("inf")

LOSS_SCALE = 2.0**10
"""Initial scale of `make_scaler`."""


@dataclass
class Rig:
    """Parameters in one layout, whose gradients every rank can compute by itself.

    Args:
        named: the parameters of this rank, with their names.
        target: name of the parameter that `poison` writes into.
        split_over: argument of the clipper.
        coordinate: position of this rank along the axes that hold different parameters, -1 without such an axis.
        replicated: whether all ranks hold the same gradients, non-finite elements included.
    """

    named: list[tuple[str, nn.Parameter]]
    target: str
    split_over: Any = None
    coordinate: int = -1
    replicated: bool = False

    def key(self, name: str, param: Tensor) -> str:
        """Return a name that is equal on two ranks exactly if both hold the same parameter or pieces of it."""
        differs = self.coordinate >= 0 and (not isinstance(param, DTensor) or self.target.startswith("stage"))
        differs = differs and "copy" not in name
        return f"{name}@{self.coordinate}" if differs else name

    def distribute(self, param: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, sharded like the parameter."""
        whole = whole.to(param.dtype)
        if isinstance(param, DTensor):
            return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
        return whole.clone()

    def fill(self, step: int, factor: float = 1.0) -> None:
        """Set the gradients of a step, multiplied by a factor."""
        for name, param in self.named:
            whole = whole_gradient(self.key(name, param), param.shape, step)
            param.grad = self.distribute(param, whole * factor)

    def poison(self, rank: int, *values: float) -> str:
        """Write non-finite elements on one rank, and return the words for them in messages."""
        if self.replicated or dist.get_rank() == rank:
            local_tensor(dict(self.named)[self.target].grad).view(-1)[: len(values)] = torch.tensor(values)
        nans = sum(value != value for value in values)
        counts = [f"{n} {kind}" for n, kind in ((nans, "NaN"), (len(values) - nans, "Inf")) if n]
        # Each rank counts in its own replica: no rank is named.
        return f"{self.target} ({' and '.join(counts)}{'' if self.replicated else f' on rank {rank}'})"

    def gather_whole(self, get: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """Gather the whole tensors that `get` returns for the parameters of all ranks, by key and in float64."""
        local = {}
        for name, param in self.named:
            tensor = get(param)
            if tensor is not None:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                local[self.key(name, param)] = whole.detach().double()
        return {key: value for rank in gather_from_ranks(local) for key, value in rank.items()}

    def grads(self) -> list[Tensor]:
        """Return this rank's parts of the gradients that exist."""
        return [local_tensor(param.grad) for _, param in self.named if param.grad is not None]

    def clipper(self, policy: Any, **options: Any) -> GradClipper:
        """Make a clipper of these parameters."""
        return GradClipper(self.named, policy, split_over=self.split_over, **options)

    def optimizer(self, kind: str) -> torch.optim.Optimizer:
        """Make an optimizer of `OPTIMIZERS` for these parameters."""
        # The multi-tensor kernels of torch take DTensors and plain tensors in separate groups only.
        sharded = [p for _, p in self.named if isinstance(p, DTensor)]
        plain = [p for _, p in self.named if not isinstance(p, DTensor)]
        return OPTIMIZERS[kind]([{"params": params} for params in (sharded, plain) if params])


def whole_gradient(key: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Return the whole gradient of a step in float64, the same on every rank."""
    return random_grad(*shape, seed=zlib.crc32(f"{key}/{step}".encode())).double()


def ddp() -> Rig:
    model = DistributedDataParallel(mlp(8, 6, 4))
    named = [(name.removeprefix("module."), param) for name, param in model.named_parameters()]
    return Rig(named, "2.weight", replicated=True)


def fsdp2() -> Rig:
    model = mlp(8, 6, 4)
    fully_shard(model)
    return Rig(list(model.named_parameters()), "2.weight")


def tp() -> Rig:
    """Make a rig whose first parameters are plain and replicated."""
    model = parallelize_module(Block(), world_mesh("tp"), PLAN)
    return Rig(list(model.named_parameters()), "down.weight")


def megatron() -> Rig:
    weight = tagged_param(random_grad(3, 4), tensor_model_parallel=True, partition_dim=0)
    named = [("copy", plain_param(random_grad(5))), ("weight", weight)]
    return Rig(named, "weight", dist.group.WORLD, dist.get_rank())


def stages() -> Rig:
    num_rows = 3 + dist.get_rank()
    named = [("bias", plain_param(random_grad(num_rows))), ("weight", plain_param(random_grad(num_rows, 4)))]
    return Rig(named, "weight", world_mesh("pp"), dist.get_rank())


def experts() -> Rig:
    mesh = world_mesh("ep")
    dense = dtensor_param(random_grad(8, 3), mesh, [Shard(0)])
    return Rig([("dense", dense), ("expert", plain_param(random_grad(3, 4)))], "expert", mesh, dist.get_rank())


def stages_fsdp2() -> Rig:
    mesh = world_mesh("pp", "dp")
    stage = nn.Module()
    stage.stage = mlp(8, 6 + 2 * mesh.get_local_rank("pp"), 8)
    fully_shard(stage, mesh=mesh["dp"])
    return Rig(list(stage.named_parameters()), "stage.2.weight", mesh["pp"], mesh.get_local_rank("pp"))


RIGS = {make.__name__: make for make in (ddp, fsdp2, tp, megatron, stages, experts, stages_fsdp2)}
RIG_CASES = [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("tp", 2), ("megatron", 4), ("stages", 4), ("experts", 4)]
RIG_CASES += [("stages_fsdp2", 4)]
each_rig = pytest.mark.parametrize(("name", "num_ranks"), RIG_CASES)
"""Parametrize a test decorated with `@on_ranks()` over all rigs, on two ranks or on four."""


def build_rig(name: str) -> Rig:
    """Make the rig of that name on this rank."""
    return RIGS[name]()


def make_scaler(**options: Any) -> torch.amp.GradScaler:
    """Make a loss scaler that has already scaled a loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE, **options)
    scaler.scale(torch.ones(()))
    return scaler


def local_tensor(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_bytes(tensors: Any) -> list[bytes]:
    """Return the bytes of each tensor on this rank, to compare bit by bit."""
    return [local_tensor(t).detach().contiguous().numpy().tobytes() for t in tensors]


def training_state(rig: Rig, *optimizers: torch.optim.Optimizer) -> list[bytes]:
    """Return the bytes of parameters, optimizer states and step counters."""
    states = [optimizer.state.get(p, {}) for optimizer in optimizers for _, p in rig.named]
    return to_bytes([p for _, p in rig.named] + [value for state in states for value in state.values()])


def policy_state(clipper: GradClipper) -> list[bytes]:
    """Return the bytes of a policy's state."""
    return to_bytes(value for state in clipper.state_dict()["state"].values() for value in state.values())


def record_warnings(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of `call` and its NonFiniteWarnings, which must be the same on every rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert all(warning.category is NonFiniteWarning for warning in caught), [str(w.message) for w in caught]
    messages = [str(warning.message) for warning in caught]
    assert gather_from_ranks(messages) == [messages] * dist.get_world_size()
    return result, messages


def assert_same_on_ranks(clipper: GradClipper, *values: Any) -> None:
    """Assert that all ranks have the same incidents, skipped steps and other values."""
    by_rank = gather_from_ranks((clipper.incidents, clipper.skipped, *values))
    assert by_rank == [by_rank[0]] * len(by_rank)


def assert_raises_on_ranks(
    call: Callable[[], Any], kind: type[Exception], *words: str, unchanged: Tensor | None = None
) -> None:
    """Assert that `call` raises `kind` with these words on every rank, and that the world can go on.

    Args:
        call: the call, made on every rank.
        kind: class of the error.
        words: parts of the message.
        unchanged: tensor that the call must not write.
    """
    before = None if unchanged is None else unchanged.clone()
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    if unchanged is not None:
        assert before is not None
        assert torch.equal(before.nan_to_num(), unchanged.nan_to_num()), "a gradient was written"
    dist.barrier()
