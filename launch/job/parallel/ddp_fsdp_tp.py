"""Distribute a model with torch's DDP, FSDP1, FSDP2 and tensor parallelism."""

import warnings

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

from ..data import Criterion
from ..models.gpt import Block, Embed
from .base import ParallelModel

# The warning is about in-place writes to the model's output, and the loss makes none.
warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")


def single(model: nn.Sequential, mesh: None, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Leave the model as it is."""
    return ParallelModel(model, criterion)


def ddp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Wrap the model in DistributedDataParallel."""
    return ParallelModel(DistributedDataParallel(model, device_mesh=mesh["dp"]), criterion)


def fsdp1(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Shard the model with FullyShardedDataParallel."""

    def wrap(module: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(module, device_mesh=mesh["dp"], device_id=x.device, use_orig_params=True)

    for i in range(1, len(model) - 1):
        if list(model[i].parameters()):
            model[i] = wrap(model[i])
    return ParallelModel(wrap(model), criterion)


def fsdp2(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Shard the model with fully_shard."""
    return ParallelModel(shard_(model, mesh), criterion)


def tp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Split the model with tensor parallelism."""
    return ParallelModel(split_(model, mesh["tp"]), criterion)


def fsdp2_tp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor) -> ParallelModel:
    """Split the model with tensor parallelism, then shard it with fully_shard."""
    return ParallelModel(shard_(split_(model, mesh["tp"]), mesh["dp"]), criterion)


def shard_(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Shard each inner part separately, and the first and last part together."""
    for part in model[1:-1]:
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def split_(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    """Apply tensor parallelism to all parts except recurrent layers and norms, which remain replicated."""
    plan: dict[str, ParallelStyle] = {}
    linears = [name for name, part in model.named_children() if isinstance(part, nn.Linear)]
    for i, name in enumerate(linears):
        # A column-wise layer is followed by a row-wise one, so that no gather is needed between them. The last layer
        # gathers its output if it has no partner.
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
                    f"model.heads={part.heads}: not divisible by {mesh.size()} tensor-parallel ranks. "
                    f"Use model.heads={mesh.size()} or start fewer ranks"
                )
            plan |= {f"{name}.{p}": ColwiseParallel() for p in ("q", "k", "v", "up")}
            plan |= {f"{name}.{p}": RowwiseParallel() for p in ("out", "down")}
    return parallelize_module(model, mesh, plan)
