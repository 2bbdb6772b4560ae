"""Declare the attributes of DeepSpeed 0.19 that this integration relies on.

DeepSpeed documents few of them, so a new version may rename one. Each protocol has what the adapter of that optimizer
reads, and then what it replaces. No class of DeepSpeed is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "BF16Optimizer",
    "Engine",
    "FP16Optimizer",
    "Mpu",
    "Parameter",
    "TorchOptimizer",
    "ZeroStage3",
    "ZeroStages12",
]


class Mpu(Protocol):
    """Tensor-parallel groups, as Megatron gives them to DeepSpeed.

    A newer Megatron has `get_tensor_model_parallel_group` instead.
    """

    def get_model_parallel_group(self) -> dist.ProcessGroup: ...


class Engine(Protocol):
    """DeepSpeedEngine."""

    module: nn.Module
    optimizer: Any
    mpu: Mpu | None
    seq_data_parallel_group: dist.ProcessGroup
    pipeline_parallelism: bool

    def gradient_accumulation_steps(self) -> int: ...

    # Replaced at stage 0: clipping in float32, and a backward pass that forgets the loss scale in float16.
    clip_fp32_gradients: Callable[[], None]
    backward: Callable[..., Tensor]


class Parameter(Protocol):
    """A parameter of the engine's module, with the attributes of DeepSpeed and Megatron.

    Any of these may be absent.
    """

    allreduce: bool  # False for an expert
    group_name: str  # of an expert's process groups
    tensor_model_parallel: bool
    model_parallel: bool
    partition_dim: int
    ds_pipe_replicated: bool  # True on a tied copy that must not be counted
    ds_shape: torch.Size  # at stage 3, where the parameter itself is empty
    ds_numel: int

    def partition_numel(self) -> int: ...


class TorchOptimizer(Protocol):
    """The optimizer of a float32 engine at stage 0, which the engine steps itself."""

    param_groups: list[dict[str, Any]]

    # Replaced, or set because the engine reads them from its other optimizers.
    step: Callable[..., Any]
    overflow: bool
    _global_grad_norm: Tensor | None


class FP16Optimizer(Protocol):
    """FP16_Optimizer and FP16_UnfusedOptimizer: stage 0 in float16 or bfloat16."""

    optimizer: torch.optim.Optimizer
    fp16_groups: list[list[Tensor]]
    fp32_groups: list[list[Tensor]]  # FP16_UnfusedOptimizer
    fp32_groups_flat: list[Tensor]  # FP16_Optimizer
    low_precision_dtype: torch.dtype
    loss_scale: float
    overflow: bool

    def _skip_invalid_grad_norm(self) -> None: ...

    def _update_scale(self, skip: bool) -> None: ...

    # Replaced.
    step: Callable[..., bool]


class ZeroStages12(Protocol):
    """DeepSpeedZeroOptimizer. Each list has an entry per parameter group."""

    round_robin_bit16_groups: list[list[Tensor]]
    round_robin_bit16_offsets: list[list[int]]
    real_dp_process_group: list[dist.ProcessGroup]
    partition_size: list[int]
    single_partition_of_fp32_groups: list[Tensor]
    averaged_gradients: dict[int, Sequence[Tensor]]
    params_in_partition: list[list[Tensor]]
    cpu_offload: bool
    device: torch.device

    # Replaced.
    scaled_global_norm: Callable[..., Tensor]
    unscale_and_clip_grads: Callable[..., None]
    check_overflow: Callable[..., None]
    check_grad_overflow: bool
    compute_grad_norm: bool


class BF16Optimizer(Protocol):
    """BF16_Optimizer. Each list has an entry per parameter group."""

    bf16_groups: list[list[Tensor]]
    real_dp_process_group: list[dist.ProcessGroup]
    fp32_groups_flat_partition: list[Tensor]
    fp32_groups_gradient_flat_partition: list[Tensor]
    fp32_groups_gradients_flat: list[Tensor]

    # Replaced.
    get_grads_for_norm: Callable[..., Any]
    mpu: Mpu | None


class ZeroStage3(Protocol):
    """DeepSpeedZeroOptimizer_Stage3. Each list has an entry per parameter group."""

    fp16_groups: list[list[Parameter]]
    fp32_partitioned_groups_flat: list[Tensor]
    averaged_gradients: dict[int, Sequence[Tensor]]
    offload_optimizer: bool
    device: torch.device

    def _get_param_partition_group(self, param: Parameter) -> dist.ProcessGroup: ...

    def _get_param_partition_rank(self, param: Parameter) -> int: ...

    # Replaced.
    _get_norm_groups: Callable[[], list[Tensor]]
    unscale_and_clip_grads: Callable[..., None]
    check_overflow: Callable[..., None]
