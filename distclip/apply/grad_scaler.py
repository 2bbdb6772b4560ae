"""Work with a `torch.amp.GradScaler`: read the loss scale, and give it the found_inf of all ranks.

A GradScaler checks the gradients of one rank, or DTensors over the mesh of the first of them. Under tensor, pipeline or
expert parallelism some ranks would therefore step while others skip. So the found_inf of all ranks is written into the
records that the scaler keeps between `unscale_` and `update`. The caller still calls `update`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import ArgumentError, short_repr

__all__ = ["ScalerState", "enabled", "initial_scale", "parameters_of"]


_NO_OPTIMIZER = 0
"""Key of a scaler's record on a rank without optimizers. The other keys are the ids of optimizers."""


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return all parameters that the optimizers step."""
    # Every step needs them, so the loops run in C.
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    return list(chain.from_iterable(group["params"] for group in groups))


def enabled(scaler: Any) -> Any:
    """Return the scaler, or None for a GradScaler that was constructed with `enabled=False`."""
    return None if isinstance(scaler, GradScaler) and not scaler.is_enabled() else scaler


def initial_scale(scaler: Any) -> tuple[float, bool]:
    """Return the scale that an enabled scaler starts with, and whether it has scaled a loss on this rank.

    Raises:
        ArgumentError: `scaler` is not a GradScaler.
    """
    if not isinstance(scaler, GradScaler):
        raise ArgumentError(f"scaler={short_repr(scaler)}: not a torch.amp.GradScaler. Pass one, or None.")
    return scaler.get_scale(), scaler._scale is not None


class ScalerState:
    """The records of an enabled GradScaler for one step of some optimizers.

    Args:
        scaler: a GradScaler, or a subclass such as ShardedGradScaler.
        optimizers: the optimizers that step together.

    Raises:
        ArgumentError: an optimizer has stepped since the last `scaler.update()`.
    """

    def __init__(self, scaler: GradScaler, optimizers: Sequence[Optimizer]) -> None:
        if scaler._scale is None:
            # A pipeline stage without a loss starts at the scale of the last stage, which all ranks have compared.
            devices = (param.device for param in parameters_of(optimizers))
            scaler._lazy_init_scale_growth_tracker(next(devices, torch.device("cpu")))
        self.scaler, self.optimizers = scaler, optimizers
        if any(record["stage"] is OptState.STEPPED for record in self._records()):
            raise ArgumentError(
                "scaler: an optimizer has stepped since the last scaler.update(). Call scaler.update() once after "
                "every step, after all optimizers have stepped."
            )

    @property
    def round(self) -> object:
        """Identity of the round: the same object from one `scaler.update()` to the next."""
        return self.scaler._per_optimizer_states

    @property
    def loss_scale(self) -> Tensor:
        """Factor that gradients carry until they are unscaled, 0-d."""
        assert self.scaler._scale is not None
        return self.scaler._scale

    def scaled_optimizers(self) -> list[Optimizer]:
        """Return the optimizers whose gradients `scaler.unscale_` has not unscaled."""
        records = zip(self.optimizers, self._records(), strict=True)
        return [optimizer for optimizer, record in records if record["stage"] is OptState.READY]

    def others_unscaled(self) -> bool:
        """Return whether the caller has unscaled an optimizer that is not among these."""
        ids = {id(optimizer) for optimizer in self.optimizers}
        records = self.scaler._per_optimizer_states.items()
        return any(record["stage"] is OptState.UNSCALED for key, record in records if key not in ids | {_NO_OPTIMIZER})

    def check_dtypes(self) -> None:
        """Raise if unscaling would flush gradients to zero, as the scaler itself does.

        Raises:
            ArgumentError: a gradient is float16, and the scaler is not a ShardedGradScaler.
        """
        if type(self.scaler).__name__ == "ShardedGradScaler":
            return
        if any(p.grad is not None and p.grad.dtype == torch.float16 for p in parameters_of(self.optimizers)):
            raise ArgumentError(
                "Attempting to unscale FP16 gradients: small ones would become 0. Keep parameters in float32 and "
                "compute under torch.autocast."
            )

    def set_found_inf(self, found_inf: Tensor, *, elsewhere: Tensor | None = None) -> None:
        """Give the scaler the result of all ranks, so that `update` changes the scale equally on each.

        Args:
            found_inf: 0-d float32, 1.0 if a gradient of any rank is not finite, otherwise 0.0. With 1.0 the scaler
                skips the step of these optimizers.
            elsewhere: the same value for other gradients, which lower the scale and skip no step of these optimizers.
                None for none.
        """
        # A rank without optimizers has a record too, because `update` needs the found_inf of every step.
        records = self._records() or [self.scaler._per_optimizer_states[_NO_OPTIMIZER]]
        for record in records:
            own = found_inf.detach().clone()
            record["found_inf_per_device"] = {own.device: own}
            record["stage"] = OptState.UNSCALED
        if elsewhere is not None:
            record = self.scaler._per_optimizer_states[_NO_OPTIMIZER]
            record["found_inf_per_device"] = {elsewhere.device: elsewhere.detach().clone()}

    def mark_stepped(self) -> None:
        """Record that the optimizers have stepped, or skipped the step."""
        for record in self._records():
            record["stage"] = OptState.STEPPED

    def stages(self) -> list[OptState]:
        """Return the stage of each optimizer in this round."""
        return [record["stage"] for record in self._records()]

    def restore(self, stages: Sequence[OptState], num_stepped: int) -> None:
        """Record that a step has failed after some of the optimizers have stepped.

        Args:
            stages: stage of each optimizer before the step.
            num_stepped: number of optimizers that have stepped.
        """
        for i, (record, stage) in enumerate(zip(self._records(), stages, strict=True)):
            record["stage"] = OptState.STEPPED if i < num_stepped else stage

    def _records(self) -> list[dict[str, Any]]:
        return [self.scaler._per_optimizer_states[id(optimizer)] for optimizer in self.optimizers]
