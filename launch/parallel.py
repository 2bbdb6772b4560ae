"""Ways to place a model on the ranks of a mesh; pipeline stages have a file of their own."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from distclip import Comm
from gpt import Block, Embed
from stepping import Stepping

# The loss does not write into the model's output, which is all that torch is worried about.
warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")

Criterion = Callable[[Tensor, Tensor], Tensor]


class Placed:
    """A model on its ranks. Losses are this rank's own: the mean over its share of the batch."""

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion,
        split_over: DeviceMesh | None = None,
        comm: Comm | None = None,
    ) -> None:
        self.module = module
        self.criterion = criterion
        self.split_over = split_over  # the axis on which ranks hold different parameters
        self.comm = comm  # everybody, where no mesh says so
        self.scale: Callable[[Tensor], Tensor] = lambda loss: loss  # before backward; losses are reported without

    def train(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Forward and backward; None on a rank that does not see the loss."""
        loss = self.criterion(self.forward(x), y)
        self.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.criterion(self.forward(x), y)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    def backward(self, loss: Tensor) -> None:
        self.scale(loss).backward()

    def stepping(self, *given: Any) -> Stepping:
        """What makes a step of its gradients, from what `Stepping` is given."""
        return Stepping(self, *given)


def single(model: nn.Sequential, mesh: None, criterion: Criterion, x: Tensor) -> Placed:
    return Placed(model, criterion)


def ddp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> Placed:
    return Placed(DistributedDataParallel(model, device_mesh=mesh["dp"]), criterion)


def fsdp1(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> Placed:
    def wrap(module: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(module, device_mesh=mesh["dp"], device_id=x.device, use_orig_params=True)

    for i in range(1, len(model) - 1):
        if list(model[i].parameters()):
            model[i] = wrap(model[i])
    return Placed(wrap(model), criterion)


def fsdp2(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> Placed:
    return Placed(shard_(model, mesh), criterion)


def tp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> Placed:
    return Placed(split_(model, mesh["tp"]), criterion)


def fsdp2_tp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> Placed:
    return Placed(shard_(split_(model, mesh["tp"]), mesh["dp"]), criterion)


def shard_(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Shard every part between the ends on its own, and the ends together."""
    for part in model[1:-1]:
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def split_(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Tensor parallelism; recurrent weights and norms have no plan and stay plain and replicated."""
    plan: dict[str, ParallelStyle] = {}
    linears = [name for name, part in model.named_children() if isinstance(part, nn.Linear)]
    for i, name in enumerate(linears):
        # In pairs, so that nothing is gathered in between; a last one without a partner gathers.
        if i % 2:
            plan[name] = RowwiseParallel()
        elif i + 1 < len(linears):
            plan[name] = ColwiseParallel()
        elif model.get_submodule(name).out_features >= mesh.size():
            plan[name] = ColwiseParallel(output_layouts=Replicate())
    for name, part in model.named_children():
        if isinstance(part, nn.Embedding):
            plan[name] = RowwiseParallel(input_layouts=Replicate())
        elif isinstance(part, Embed):
            plan[f"{name}.token"] = RowwiseParallel(input_layouts=Replicate())
        elif isinstance(part, Block):
            if part.heads % mesh.size():
                raise SystemExit(
                    f"model.heads={part.heads} does not split over {mesh.size()} tensor-parallel "
                    f"ranks: write model.heads={mesh.size()} or start fewer ranks"
                )
            plan |= {f"{name}.{p}": ColwiseParallel() for p in ("q", "k", "v", "up")}
            plan |= {f"{name}.{p}": RowwiseParallel() for p in ("out", "down")}
    return parallelize_module(model, mesh, plan)
