"""Declare the custom operators of a graph, each with a version for fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..apply import scale
from ..devices import accumulation_dtype, host_reads_free
from ..norms import kernels
from ..sharding.shard import Shard, Shards

__all__ = ["clamp_", "fused_adam_", "fused_sgd_", "power_sums", "scale_", "zero_where_"]


@torch.library.custom_op(
    "distclip::power_sums", mutates_args=(), schema="(Tensor[] tensors, float norm_type) -> Tensor"
)
def power_sums(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Compute Σ|g|^p of each tensor, or max|g|, see `norms.kernels.power_sums`: (n,)."""
    return kernels.power_sums(tensors, norm_type, tensors[0].device)[0]


@power_sums.register_fake
def _(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    device = tensors[0].device
    return torch.empty(len(tensors), dtype=accumulation_dtype(device), device=device)


@torch.library.custom_op(
    "distclip::scale_", mutates_args=("tensors",), schema="(Tensor(a!)[] tensors, Tensor factors) -> ()"
)
def scale_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply tensors by one factor, (1,), or by one each, (n,), in place."""
    shards = Shards.of([Shard("", tensor, slot=i) for i, tensor in enumerate(tensors)])
    scale.scale_(shards, factors)


@torch.library.custom_op(
    "distclip::clamp_",
    mutates_args=("tensors",),
    schema="(Tensor(a!)[] tensors, float low, float high, bool magnitudes) -> ()",
)
def clamp_(tensors: Sequence[Tensor], low: float, high: float, magnitudes: bool) -> None:
    """Clamp every element of tensors, or its magnitude, to [low, high] in place."""
    scale.clamp_(Shards.of([Shard("", tensor) for tensor in tensors]), low, high, magnitudes=magnitudes)


@torch.library.custom_op(
    "distclip::zero_where_", mutates_args=("tensors",), schema="(Tensor(a!)[] tensors, Tensor condition) -> ()"
)
def zero_where_(tensors: Sequence[Tensor], condition: Tensor) -> None:
    """Set tensors to 0 in place where a 0-d condition holds."""
    if host_reads_free(condition.device) and not bool(condition):
        return
    for tensor in tensors:
        tensor.masked_fill_(condition, 0)


_STATE = "Tensor(a!)[] params, Tensor[] grads"


@torch.library.custom_op(
    "distclip::fused_adam_",
    mutates_args=("params", "means", "squares", "max_squares", "steps"),
    schema=f"({_STATE}, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor(d!)[] max_squares, Tensor(e!)[] steps, "
    "Tensor found_inf, Tensor? lr_tensor, float lr, float beta1, float beta2, float weight_decay, float eps, "
    "bool amsgrad, bool maximize, bool decoupled) -> ()",
)
def fused_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    max_squares: list[Tensor],
    steps: list[Tensor],
    found_inf: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
) -> None:
    """Take a step of the fused Adam or AdamW, or none if `found_inf` is 1."""
    adam(
        params,
        grads,
        means,
        squares,
        max_squares,
        steps,
        foreach=False,
        fused=True,
        found_inf=found_inf,
        decoupled_weight_decay=decoupled,
        amsgrad=amsgrad,
        beta1=beta1,
        beta2=beta2,
        lr=lr if lr_tensor is None else lr_tensor,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )


@torch.library.custom_op(
    "distclip::fused_sgd_",
    mutates_args=("params", "buffers"),
    schema=f"({_STATE}, Tensor(b!)[] buffers, Tensor found_inf, Tensor? lr_tensor, float lr, float weight_decay, "
    "float momentum, float dampening, bool nesterov, bool maximize) -> ()",
)
def fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    found_inf: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Take a step of the fused SGD, or none if `found_inf` is 1."""
    momentum_buffers: list[Tensor | None] = [*buffers] if buffers else [None] * len(params)
    sgd(
        params,
        grads,
        momentum_buffers,
        foreach=False,
        fused=True,
        found_inf=found_inf,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr if lr_tensor is None else lr_tensor,  # type: ignore[arg-type]
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
    )


@scale_.register_fake
def _(tensors: Sequence[Tensor], factors: Tensor) -> None: ...


@clamp_.register_fake
def _(tensors: Sequence[Tensor], low: float, high: float, magnitudes: bool) -> None: ...


@zero_where_.register_fake
def _(tensors: Sequence[Tensor], condition: Tensor) -> None: ...


@fused_adam_.register_fake
def _(*arguments: object) -> None: ...


@fused_sgd_.register_fake
def _(*arguments: object) -> None: ...
