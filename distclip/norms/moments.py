r"""Compare this rank's gradients with Adam's second moments, for the root mean square of a step's update.

.. math:: \sum_i \frac{g_i^2}{\max(\hat v_i, \varepsilon^2)}, \qquad
    \hat v = \frac{\beta_2 v + (1 - \beta_2) g^2}{1 - \beta_2^t}

The moments are those that the optimizer is about to divide by, and include this step's gradient. So a ratio is at most
1 / (1 - β2), even for a row of an embedding whose moments have decayed to 0. Sums and numbers of elements are both
divided by the number of replicas. So a rank without moments for its shard, which another rank's optimizer steps, does
not change the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import devices
from ..errors import ArgumentError, LayoutError
from ..sharding.dtensor import local_of
from ..sharding.shard import Shards

__all__ = ["SecondMoments", "debias", "find_moments", "may_get_moments", "sum_ratios"]

_Moment = tuple[Tensor, float, Any]
"""Second moments of one parameter before bias correction, β2, and the number of steps that they include.

The number is None for an optimizer that counts no steps.
"""


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Optimizers that are about to step, with whose second moments gradients are compared.

    Args:
        optimizers: of this rank.
        eps: ε, > 0.
        loss_scale: 0-d, factor by which the gradients are scaled. None for 1.
        is_alone: whether no other rank contributes moments.
    """

    optimizers: Sequence[Optimizer]
    eps: float
    loss_scale: Tensor | None = None
    is_alone: bool = False


def sum_ratios(
    shards: Shards, tensors: Sequence[Tensor], moments: SecondMoments
) -> tuple[list[Tensor], list[float], list[float]]:
    """Sum g² / v of each shard, see the docstring of this module.

    Args:
        shards: the gradients of this rank.
        tensors: the parameter of each.
        moments: of the optimizers that step these parameters.

    Returns:
        0-d sums in the accumulation dtype, the number of elements of each, and that number times 1 − β2. All are 0 for
        a parameter without second moments, before its first step for example.

    Raises:
        ArgumentError: an optimizer has no second moments, and will have none after its first step.
        LayoutError: a gradient is partial or sparse.

    Collectives: none. Host syncs: none.
    """
    # The results are in the order of the shards, to match their slots and numbers of replicas.
    known = find_moments(moments.optimizers, is_alone=moments.is_alone)
    sums: list[Tensor] = []
    counts: list[float] = []
    rates: list[float] = []
    for info, grad, tensor in zip(shards.infos, shards.grads, tensors, strict=True):
        moment = known.get(id(tensor))
        values = torch.view_as_real(grad) if grad.is_complex() else grad
        # A tensor that stands for several parameters has a moment of another shape, and no slot.
        if moment is None or not grad.numel() or _as_real(moment[0]).shape != values.shape:
            # Every shard has a summand, so that these numbers are in the same order in every step.
            sums.append(torch.zeros((), dtype=devices.accumulation_dtype(grad.device), device=grad.device))
            counts.append(0.0)
            rates.append(0.0)
            continue
        if info.partial_sums or grad.layout is not torch.strided:
            kind = "partial" if info.partial_sums else "sparse"
            raise LayoutError(
                f"{info.name} has a {kind} gradient, which cannot be compared with second moments. Use a policy that "
                "needs norms alone, such as distclip.per_tensor_norm(1.0)."
            )
        sums.append(_sum_ratios(values, moment, moments))
        counts.append(float(values.numel()))
        rates.append(values.numel() * (1 - moment[1]))
    return sums, counts, rates


def _sum_ratios(grad: Tensor, moment: _Moment, moments: SecondMoments) -> Tensor:
    second, beta, step = moment
    # The squares of float16 gradients overflow float16.
    dtype = torch.promote_types(grad.dtype, torch.float32)
    squares = grad.to(dtype)
    if moments.loss_scale is not None:
        squares = squares / moments.loss_scale.to(squares)
    squares = squares.square()
    # The optimizer divides by these moments in this step.
    current = torch.lerp(squares, _as_real(second).to(dtype), beta) / debias(beta, (step or 0) + 1, grad.device)
    total: Tensor = (squares / current.clamp_(min=moments.eps**2)).sum(dtype=devices.accumulation_dtype(grad.device))
    return total


def debias(beta: float, num_steps: Any, device: torch.device) -> Any:
    """Return 1 - β2^t, by which second moments of t steps are divided.

    Args:
        beta: β2. No correction is needed for 0.
        num_steps: t ≥ 1, a number or a 0-d tensor.
        device: where the result is needed.

    >>> round(debias(0.999, 1, torch.device("cpu")), 6)
    0.001
    """
    if beta <= 0:
        return 1.0
    # 1 - β2^t would lose digits in float32.
    if not isinstance(num_steps, Tensor) or devices.host_reads_free(num_steps.device):
        return -math.expm1(float(num_steps) * math.log(beta))
    return -torch.expm1(num_steps.to(device, torch.float32) * math.log(beta))


def may_get_moments(optimizer: Optimizer) -> bool:
    """Return whether an optimizer without state may have second moments after its first step.

    Their decay is a β of its groups: `betas` of Adam, `beta1` and others of Adafactor. SGD without momentum never has a
    state.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> may_get_moments(torch.optim.Adam([weight])), may_get_moments(torch.optim.SGD([weight]))
    (True, False)
    """
    return any(key.startswith("beta") for group in optimizer.param_groups for key in group)


def find_moments(optimizers: Sequence[Optimizer], *, is_alone: bool) -> dict[int, _Moment]:
    """Return the second moments of this rank, by the identity of their parameter.

    Args:
        optimizers: of this rank.
        is_alone: see `SecondMoments`.

    Raises:
        ArgumentError: an optimizer has no second moments, and will have none after its first step, or has moments on
            other ranks although this rank is alone.
    """
    moments: dict[int, _Moment] = {}
    for optimizer in optimizers:
        # ZeroRedundancyOptimizer steps the parameters of this rank with an inner optimizer, which has the state.
        inner: Any = getattr(optimizer, "optim", optimizer)
        if is_alone and inner is not optimizer and getattr(optimizer, "world_size", 1) > 1:
            raise ArgumentError(
                f"optimizer: {type(optimizer).__name__} keeps the second moments of some parameters on other ranks, "
                "with which this clipper does not communicate. Pass it the DistributedDataParallel module, or "
                "comm=distclip.ProcessGroupComm(torch.distributed.group.WORLD)."
            )
        # An optimizer has no state before its first step.
        state: Any = inner.state or optimizer.state
        num_found = 0
        for group in inner.param_groups:
            beta = float(group.get("betas", (0.0, 0.0))[1])
            for parameter in group["params"]:
                values = state.get(parameter)
                if values and isinstance(second := values.get("exp_avg_sq"), Tensor):
                    num_found += 1
                    moments[id(parameter)] = local_of(second), beta, values.get("step")
        # Some parameters may never have had a gradient, but an optimizer with state has moments of at least one.
        if not num_found and (state or not may_get_moments(inner)):
            raise ArgumentError(
                f"optimizer: {type(inner).__name__} has no second moments (exp_avg_sq), with which gradients are "
                "compared. Use Adam or AdamW."
            )
    return moments


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
