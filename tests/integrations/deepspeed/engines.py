"""Build DeepSpeed engines on the ranks of a world, step them and read their parameters."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import DistclipError, NonFiniteWarning
from tests.ranks import gather_from_ranks

NAN = float("nan")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Uneven(nn.Module):
    """One large and many tiny parameters, of sizes that no number of ranks divides. No loss reaches one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 61)
        self.tiny = nn.ParameterList([nn.Parameter(torch.ones(1) + 0.01 * i) for i in range(7)])
        self.norm = nn.LayerNorm(61)
        self.last = nn.Linear(61, 3)
        self.unreached = nn.Parameter(torch.ones(5))
        self.reaches_first = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        hidden = hidden if self.reaches_first else hidden.detach()
        for scale in self.tiny:
            hidden = hidden * scale
        return self.last(hidden)


class NoOptimizer:
    """A class that has no instances."""


@dataclass(frozen=True)
class Setting:
    """Configuration of an engine.

    Args:
        stage: the ZeRO stage.
        dtype: a key of `DTYPES`.
        num_micro_batches: micro-batches of a step.
        zero: entries of `zero_optimization`.
        config: entries of the config itself.
        num_groups: parameter groups of the optimizer.
        scale_power: log2 of the initial loss scale.
        rounds_as: the dtype whose rounding to expect, if not `dtype`.
        fused: let DeepSpeed take the optimizer for its FusedAdam, which has a separate wrapper at stage 0.
    """

    stage: int
    dtype: str = "fp32"
    num_micro_batches: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    num_groups: int = 2
    scale_power: int = 4
    fused: bool = False
    rounds_as: str = ""

    @property
    def tolerance(self) -> float:
        """Relative tolerance of norms and updates."""
        return {"fp32": 2e-5, "bf16": 6e-2, "fp16": 6e-3}[self.rounds_as or self.dtype]


def import_deepspeed() -> Any:
    """Import DeepSpeed without its compiled communication, and without its warnings about torch 2.13."""
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # It demands a processor with fast float16. Torch computes in float16 on any.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def build_engine(model: nn.Module, setting: Setting, optimizer: Callable[[Any], Any], mpu: Any = None) -> Any:
    """Build an engine with a torch optimizer."""
    deepspeed = import_deepspeed()
    params = list(model.parameters())
    half = len(params) // 2
    parts = [params[:half], params[half:]] if setting.num_groups == 2 else [params]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": setting.num_micro_batches,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": setting.stage, **setting.zero},
        **setting.config,
    }
    if setting.dtype != "fp32":
        config.setdefault(setting.dtype, {"enabled": True})
    if setting.dtype == "fp16":
        config["fp16"] = {"loss_scale": 0, "initial_scale_power": setting.scale_power, "hysteresis": 1} | config["fp16"]
    fused_adam = torch.optim.Optimizer if setting.fused else NoOptimizer
    # DeepSpeed collects garbage a dozen times to print how much memory is left.
    with mock.patch.object(deepspeed.runtime.engine, "FusedAdam", fused_adam), mock.patch.object(gc, "collect"):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer([{"params": part} for part in parts]), config=config, mpu=mpu
        )
    return engine


def full_fp32_params(engine: Any) -> dict[str, Tensor]:
    """Return the full float32 parameters by name, in float64. Call it on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = engine.optimizer
    by_id: dict[int, Tensor] = {}
    if hasattr(optimizer, "fp32_groups_flat"):
        for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            parts = flat[: sum(p.numel() for p in params)].split([p.numel() for p in params])
            by_id |= {id(p): part.view(p.shape) for p, part in zip(params, parts, strict=True)}
    elif hasattr(optimizer, "fp32_groups"):
        for params, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            by_id |= {id(p): copy for p, copy in zip(params, copies, strict=True)}
    elif engine.zero_optimization_stage() < 3 and not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        # DeepSpeed's function fails with round-robin partitions.
        by_id = {id(p): p for p in engine.module.parameters()}
    full = {}
    for name, param in engine.module.named_parameters():
        tensor = by_id[id(param)] if by_id else safe_get_full_fp32_param(param)
        full[name] = tensor.detach().double().clone()
    return full


def same_params(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return whether all parameters are bitwise equal."""
    return all(torch.equal(left[name], right[name]) for name in left)


def micro_batches_of(x: Tensor, y: Tensor, num: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Return this rank's rows of each micro-batch."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return [(x.chunk(num)[k].chunk(size)[rank], y.chunk(num)[k].chunk(size)[rank]) for k in range(num)]


def backward(engine: Any, x: Tensor, y: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    loss = (engine(x.to(dtype)) - y.to(dtype)).float().square().mean() * factor
    engine.backward(loss)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def step(engine: Any, setting: Setting, seed: int, factor: float = 1.0, rank: int = 0) -> None:
    """Step on rows of this rank. The loss of one rank is multiplied by `factor`."""
    x = torch.randn(2, 13, generator=torch.Generator().manual_seed(100 * seed + dist.get_rank()))
    factor = factor if dist.get_rank() == rank else 1.0
    backward(engine, x, torch.ones(2, 3), DTYPES[setting.dtype], factor)
    engine.step()


def warnings_and_error_of(call: Callable[[], Any]) -> tuple[list[str], str]:
    """Return distclip's warnings in a call, and its error as "Class: message". Both are the same on all ranks."""
    raised = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except (DistclipError, RuntimeError) as error:
            raised = f"{type(error).__name__}: {error}"
    messages = [str(warning.message) for warning in caught if warning.category is NonFiniteWarning]
    by_rank = gather_from_ranks((messages, re.sub(r"rank \d+: ", "", raised)))
    assert by_rank == [by_rank[0]] * len(by_rank)
    return messages, raised


def reduced_grads(
    engine: Any, index: int = 0, differs: Callable[[str, Any], bool] = lambda name, param: False
) -> dict[str, Tensor]:
    """Return the gradients of a stage 0 engine after its all-reduce in float64, each of the job once.

    Args:
        engine: an engine of stage 0.
        index: index of this rank among those with different parameters.
        differs: called with (name, parameter), whether ranks have different parameters of that name.
    """
    with_grad = [(name, p) for name, p in engine.module.named_parameters() if p.grad is not None]
    local = {f"{name}@{index}" if differs(name, p) else name: p.grad.double() for name, p in with_grad}
    return {key: grad for of_rank in gather_from_ranks(local) for key, grad in of_rank.items()}
