"""From gradients to a step: the clipper, the optimizer, and for float16 the scaler of a placed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from checkpoint import Progress
from distclip import GradClipper, Report
from distclip.comm.mpi import MPIComm
from inject import Key, key
from layout import local

if TYPE_CHECKING:
    from parallel import Placed

Optim = Callable[..., Optimizer]


class Stepping:
    """`clipper.step(optimizer, scaler)`: whatever holds its gradients in places of its own has a subclass.

    `guard` is what the clipper is told of gradients that are not finite, `precision` the config group of that name.
    """

    def __init__(
        self, placed: Placed, optim: Optim, policy: Any, guard: Mapping[str, Any], precision: Any, device: torch.device
    ) -> None:
        self._module = placed.module
        self._optimizer = optim(placed.module.parameters())
        self.clipper = GradClipper(placed.module, policy, split_over=placed.split_over, comm=placed.comm, **guard)
        self._scaler = None
        if "init_scale" in precision:
            self._scaler = torch.amp.GradScaler(device.type, init_scale=precision.init_scale)
            placed.scale = self._scaler.scale

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

    def pieces(self) -> dict[Key, Callable[[], Tensor | None]]:
        """How to look up the gradient of every piece of a parameter that this rank holds."""
        return {
            key(self._module, name, param): lambda param=param: param.grad
            for name, param in self._module.named_parameters()
            if local(param).numel()
        }

    def progress(self, mesh: DeviceMesh | MPIComm | None, rows: int) -> Any:
        """What saves and loads all of it; `rows` of the batch are this rank's."""
        return Progress(self._module, self._optimizer, self.clipper, self._scaler, mesh, rows)
