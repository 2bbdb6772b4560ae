"""A torch.amp.GradScaler's part in a step: the scale that gradients carry, and a found_inf that is the world's.

The scaler itself looks at the gradients of one rank, or at DTensors over the mesh of the first of them, so that under
tensor, pipeline or expert parallelism some ranks step and others skip. Here it is told what all ranks have found.
It is told through the records that it keeps between `unscale_` and `update`; `update` stays the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import ArgumentError

__all__ = ["ScalerState", "initial_scale", "parameters_of"]


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """All that they step."""
    return [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]


def initial_scale(scaler: Any) -> tuple[float, bool]:
    """What an enabled scaler starts with, and whether it has scaled a loss on this rank.

    Raises:
        ArgumentError: no GradScaler.
    """
    if not isinstance(scaler, GradScaler):
        raise ArgumentError(f"scaler={scaler!r:.80}: expected a torch.amp.GradScaler, or None.")
    return scaler.get_scale(), scaler._scale is not None


class ScalerState:
    """One step of some optimizers under an enabled scaler.

    Args:
        scaler: a GradScaler, or a subclass (ShardedGradScaler).
        optimizers: that step together.

    Raises:
        ArgumentError: an optimizer that has stepped since the last `scaler.update()`.
    """

    def __init__(self, scaler: GradScaler, optimizers: Sequence[Optimizer]) -> None:
        if scaler._scale is None:
            # A pipeline stage that sees no loss: it starts at the scale with which the last one started.
            devices = (param.device for param in parameters_of(optimizers))
            scaler._lazy_init_scale_growth_tracker(next(devices, torch.device("cpu")))
        self.scaler, self.optimizers = scaler, optimizers
        if any(record["stage"] is OptState.STEPPED for record in self._records()):
            raise ArgumentError(
                "an optimizer has stepped since the last scaler.update(): call scaler.update() once after every step, "
                "when all optimizers have stepped."
            )

    @property
    def round(self) -> object:
        """What is the same object from one `scaler.update()` to the next."""
        return self.scaler._per_optimizer_states

    @property
    def loss_scale(self) -> Tensor:
        """What gradients are multiplied by until they are unscaled, 0-d."""
        assert self.scaler._scale is not None
        return self.scaler._scale

    def scaled(self) -> list[Optimizer]:
        """The optimizers whose gradients still carry the scale: the caller has not called `scaler.unscale_`."""
        records = zip(self.optimizers, self._records(), strict=True)
        return [optimizer for optimizer, record in records if record["stage"] is OptState.READY]

    def others_unscaled(self) -> bool:
        """Whether the caller has unscaled an optimizer that is not among these."""
        own = {id(optimizer) for optimizer in self.optimizers}
        records = self.scaler._per_optimizer_states.items()
        return any(record["stage"] is OptState.UNSCALED for one, record in records if one not in own)

    def check_dtypes(self) -> None:
        """Refuse gradients that unscaling would flush to zero, as the scaler itself does.

        Raises:
            ArgumentError: a float16 gradient (those of a ShardedGradScaler may be).
        """
        if type(self.scaler).__name__ == "ShardedGradScaler":
            return
        if any(p.grad is not None and p.grad.dtype == torch.float16 for p in parameters_of(self.optimizers)):
            raise ArgumentError(
                "Attempting to unscale FP16 gradients: small ones would become 0. Keep parameters in float32 and "
                "compute under torch.autocast."
            )

    def tell(self, found_inf: Tensor) -> None:
        """Let the scaler know what all ranks have found, so that `update` moves the scale alike on each.

        Args:
            found_inf: 0-d float32, 1.0 if a gradient of any rank is not finite, otherwise 0.0.
        """
        for record in self._records():
            own = found_inf.detach().clone()
            record["found_inf_per_device"] = {own.device: own}
            record["stage"] = OptState.UNSCALED

    def stepped(self) -> None:
        """Note that the optimizers have stepped, or left the step out."""
        for record in self._records():
            record["stage"] = OptState.STEPPED

    def _records(self) -> list[dict[str, Any]]:
        return [self.scaler._per_optimizer_states[id(optimizer)] for optimizer in self.optimizers]
