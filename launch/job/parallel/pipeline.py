"""Distribute a model over pipeline stages, each a contiguous run of the model's parts."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from ..data import Criterion
from ..models.recurrent import recurrences, reset_states
from .base import ParallelModel
from .ddp_fsdp_tp import shard_


class PipelineModel(ParallelModel):
    """One pipeline stage. Only the last stage computes the loss."""

    def __init__(self, stage: PipelineStage, microbatches: int, criterion: Criterion, axis: DeviceMesh) -> None:
        super().__init__(stage.submod, criterion, split_over=axis)
        self.stage = stage
        self.losses: list[Tensor] = []
        self.schedule = ScheduleGPipe(stage, microbatches, self._compute_loss)

    def forward_backward(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self._run(self.schedule.step, x, y)

    def measure_samples(self) -> None:
        """Return None, because a stage runs several micro-batches."""

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self._run(self.schedule.eval, x, y)

    def _compute_loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(output, target)
        self.losses.append(loss.detach())
        return self.scale_loss(loss)

    def _run(self, step: Callable[..., object], x: Tensor, y: Tensor) -> Tensor | None:
        inputs = (x,) if self.stage.is_first else ()
        if not self.stage.is_last:
            step(*inputs)
            return None
        self.losses.clear()
        step(*inputs, target=y)
        # There is one loss for each microbatch.
        return torch.stack(self.losses).mean()


def pp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor, microbatches: int) -> ParallelModel:
    """Build this rank's pipeline stage. Stages with several ranks are sharded with fully_shard."""
    axis = mesh["pp"]
    num_stages, index = axis.size(), axis.get_local_rank()
    if num_stages > len(model):
        raise SystemExit(
            f"parallel.mesh.pp={num_stages}: the model has {len(model)} parts. Use {len(model)} stages or fewer"
        )
    # A carried state passes from one whole batch to the next.
    microbatches = 1 if recurrences(model) else microbatches
    if len(x) % microbatches:
        raise SystemExit(
            f"parallel.place.microbatches={microbatches}: does not divide a rank's {len(x)} rows of the batch. "
            "Use a divisor, or another batch"
        )
    cuts = [i * len(model) // num_stages for i in range(num_stages + 1)]
    # torch gets the shapes between the stages here. Otherwise it would find them by a forward pass, which would change
    # a carried state.
    activations = [x[: len(x) // microbatches]]
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            activations.append(model[start:stop](activations[-1]))
    reset_states(model)
    first, last = activations[index].requires_grad_(index > 0), activations[index + 1].requires_grad_()
    part = model[cuts[index] : cuts[index + 1]]
    if mesh["dp"].size() > 1:
        shard_(part, mesh["dp"])
    stage = PipelineStage(part, index, num_stages, x.device, first, last, group=axis.get_group())
    return PipelineModel(stage, microbatches, criterion, axis)
