"""Let fused optimizers apply a factor and skip a step, so that the host neither multiplies nor waits.

torch's fused optimizers divide gradients by their attribute `grad_scale`, and do nothing where their attribute
`found_inf` is exactly 1.0. Both are tensors on the device. This saves a pass over the gradients if they must be
multiplied anyway (a loss scale), and a host sync if a step may have to be skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

from ..devices import rounds_grad_scale

__all__ = ["fused_step", "supports_grad_scale"]


def supports_grad_scale(optimizer: Optimizer) -> bool:
    """Return whether an optimizer divides gradients by `grad_scale` without losing precision.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> supports_grad_scale(torch.optim.AdamW([weight], fused=True)), supports_grad_scale(torch.optim.AdamW([weight]))
    (True, False)
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        return False
    return all(
        group.get("fused") and not any(rounds_grad_scale(param.device, param.dtype) for param in group["params"])
        for group in optimizer.param_groups
    )


@contextmanager
def fused_step(optimizers: Sequence[Optimizer], divisor: Tensor | None, found_inf: Tensor) -> Iterator[None]:
    """Divide gradients and skip steps within the block, by the optimizers' kernels.

    Args:
        optimizers: those for which `supports_grad_scale` is true.
        divisor: 0-d float32. None for no division.
        found_inf: 0-d float32, exactly 1.0 to skip the step.

    The attributes are removed when the block ends, even by an exception.
    """
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
