"""Two or more pipeline stages, each a run of the model's parts."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from models import carries_state, reset_state
from parallel import Criterion, Placed, shard_


class Staged(Placed):
    """One pipeline stage; only the last one sees the loss."""

    def __init__(self, stage: PipelineStage, microbatches: int, criterion: Criterion, axis: DeviceMesh) -> None:
        super().__init__(stage.submod, criterion, split_over=axis)
        self.stage = stage
        self.losses: list[Tensor] = []
        self.schedule = ScheduleGPipe(stage, microbatches, self._loss)

    def train(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self._run(self.schedule.step, x, y)

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self._run(self.schedule.eval, x, y)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(output, target)
        self.losses.append(loss.detach())
        return self.scale(loss)

    def _run(self, step: Callable[..., object], x: Tensor, y: Tensor) -> Tensor | None:
        inputs = (x,) if self.stage.is_first else ()
        if not self.stage.is_last:
            step(*inputs)
            return None
        self.losses.clear()
        step(*inputs, target=y)
        return torch.stack(self.losses).mean()


def pp(model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor, microbatches: int) -> Placed:
    axis = mesh["pp"]
    stages, index = axis.size(), axis.get_local_rank()
    if stages > len(model):
        raise SystemExit(
            f"parallel.mesh.pp={stages} is more stages than the model has parts: "
            f"write parallel.mesh.pp={len(model)} or less"
        )
    microbatches = 1 if carries_state(model) else microbatches
    if len(x) % microbatches:
        raise SystemExit(
            f"a rank's {len(x)} rows of the batch do not split into "
            f"parallel.place.microbatches={microbatches}: write a batch that does"
        )
    cuts = [i * len(model) // stages for i in range(stages + 1)]
    # Given the shapes, torch needn't find them by a forward pass, which would move a carried state.
    edges = [x[: len(x) // microbatches]]
    with torch.no_grad():
        for a, b in pairwise(cuts):
            edges.append(model[a:b](edges[-1]))
    reset_state(model)
    before, after = edges[index].requires_grad_(index > 0), edges[index + 1].requires_grad_()
    part = model[cuts[index] : cuts[index + 1]]
    if mesh["dp"].size() > 1:
        shard_(part, mesh["dp"])
    stage = PipelineStage(part, index, stages, x.device, before, after, group=axis.get_group())
    return Staged(stage, microbatches, criterion, axis)
