"""Define a distributed model and its clipped optimizer, with the forms that plain torch models take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

import distclip
from distclip import Comm, GradClipper, Policy, Report
from distclip.auditing import Audit
from distclip.monitor.sample_norms import PerSample, per_sample

from ..checkpoint import ShardedState, TrainingState
from ..data import Criterion
from ..inject import ShardKey, shard_key
from ..mesh import Ranks, to_local


@dataclass(frozen=True)
class StepConfig:
    """Settings of an optimizer step."""

    optim: Callable[..., Optimizer]
    """Function that builds the optimizer of some parameters."""
    policy: Policy
    on_nonfinite: Any
    max_skips: int | None
    precision: DictConfig
    """The config group `precision`."""
    device: torch.device


class ClippedOptimizer(Protocol):
    """An optimizer that clips in its step."""

    clipper: GradClipper

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""

    def zero_grad(self) -> None:
        """Reset the gradients before a forward pass."""

    def step(self) -> Report:
        """Clip the gradients and update the parameters, unless the step is skipped."""

    def audit(self) -> Audit:
        """Check the distribution of the parameters, on all ranks together."""

    def gradients(self) -> dict[ShardKey, Callable[[], Tensor | None]]:
        """Return a getter for the gradient of each shard on this rank."""

    def training_state(self, ranks: Ranks, num_rows: int) -> TrainingState:
        """Return the object that saves and loads the run. `num_rows` rows of a batch are on this rank."""


class ParallelModel:
    """A model on its ranks. Losses are means over this rank's rows of the batch.

    Args:
        split_over: axis whose ranks hold different parameters.
        comm: communicator of all ranks, if no mesh determines them.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion,
        split_over: DeviceMesh | None = None,
        comm: Comm | None = None,
    ) -> None:
        self.module = module
        self.criterion = criterion
        self.split_over = split_over
        self.comm = comm
        # This is applied before the backward pass. Reported losses are unscaled.
        self.scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss

    def forward_backward(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Compute gradients and return the loss, or None on a rank that does not compute it."""
        loss = self.criterion(self.forward(x), y)
        self.backward(loss)
        return loss.detach()

    def measure_samples(self) -> PerSample | None:
        """Return a measurement of each sample's part of the gradient, or None if the layout does not allow it."""
        return per_sample(self.module)

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the loss, or None on a rank that does not compute it."""
        return self.criterion(self.forward(x), y)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    def backward(self, loss: Tensor) -> None:
        self.scale_loss(loss).backward()

    def build_optimizer(self, config: StepConfig) -> ClippedOptimizer:
        """Build the optimizer with its clipper. Every rank must call it."""
        return TorchOptimizer(self, config)


class TorchOptimizer:
    """A torch optimizer with a GradClipper, and with a GradScaler in float16."""

    def __init__(self, model: ParallelModel, config: StepConfig) -> None:
        self._module, self._split_over, self._comm = model.module, model.split_over, model.comm
        self._optimizer = config.optim(model.module.parameters())
        self.clipper = GradClipper(
            model.module,
            config.policy,
            split_over=model.split_over,
            comm=model.comm,
            on_nonfinite=config.on_nonfinite,
            max_skips=config.max_skips,
        )
        self._scaler = None
        if "init_scale" in config.precision:
            self._scaler = torch.amp.GradScaler(config.device.type, init_scale=config.precision.init_scale)
            model.scale_loss = self._scaler.scale

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> Report:
        report = self.clipper.step(self._optimizer, self._scaler)
        if self._scaler is not None:
            self._scaler.update()
        return report

    def audit(self) -> Audit:
        return distclip.audit(self._module, split_over=self._split_over, optimizer=self._optimizer, comm=self._comm)

    def gradients(self) -> dict[ShardKey, Callable[[], Tensor | None]]:
        return {
            shard_key(self._module, name, param): lambda param=param: param.grad
            for name, param in self._module.named_parameters()
            if to_local(param).numel()
        }

    def training_state(self, ranks: Ranks, num_rows: int) -> TrainingState:
        return ShardedState(self._module, self._optimizer, self.clipper, self._scaler, ranks, num_rows)
