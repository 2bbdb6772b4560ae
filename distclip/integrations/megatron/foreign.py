"""Declare the attributes of Megatron-core 0.16 that this integration relies on. Megatron documents few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FsdpParameter", "LossScaler", "Optimizer", "Parameter"]


class LossScaler(Protocol):
    """A constant or dynamic grad scaler."""

    scale: Tensor

    def update(self, found_inf: bool) -> None: ...


class Optimizer(Protocol):
    """FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer, or a chain of these."""

    config: Any
    optimizer: torch.optim.Optimizer
    is_stub_optimizer: bool  # True on a rank without parameters
    grad_scaler: LossScaler | None  # absent in FP32Optimizer

    # Parameters of the model, and the tensors that are stepped instead of them, by group.
    float16_groups: list[list[Tensor]]  # Float16OptimizerWithFloat16Params
    fp32_from_float16_groups: list[list[Tensor]]
    fp32_from_fp32_groups: list[list[Tensor]]
    model_float16_groups: list[list[Tensor]]  # DistributedOptimizer
    shard_fp32_from_float16_groups: list[list[Tensor]]
    model_fp32_groups: list[list[Tensor]]
    shard_fp32_groups: list[list[Tensor]]
    shard_float16_groups: list[list[Tensor]]  # stepped by their `decoupled_grad` if the optimizer is precision-aware
    gbuf_ranges: Any
    ddp_config: Any
    model_chunks: list[Any]  # wrapped by Megatron-FSDP, they have `param_and_grad_buffer`
    data_parallel_group: dist.ProcessGroup

    def prepare_grads(self) -> bool: ...

    def _copy_model_grads_to_main_grads(self) -> None: ...

    def _get_model_param_range_map(self, param: Tensor) -> dict[str, Any]: ...

    def step_with_ready_grads(self) -> bool: ...

    def count_zeros(self) -> float: ...

    # Replaced.
    step: Callable[[], tuple[bool, float | None, float | None]]


class Parameter(Protocol):
    """A parameter of the model, with the attributes of Megatron. Any of these may be absent."""

    allreduce: bool  # False for an expert
    tensor_model_parallel: bool
    partition_dim: int
    shared: bool  # True on a copy that must not be counted
    shared_embedding: bool  # True on an embedding that several stages have


class FsdpParameter(Protocol):
    """A DTensor that an optimizer steps under Megatron-FSDP. Its shards may have any size, even 0."""

    orig_param: Tensor  # the parameter of the model, with Megatron's attributes. Between steps it has no memory
    megatron_fsdp_dist_index: Any  # FSDPDistributedIndex, the groups
