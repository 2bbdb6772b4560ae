"""DeepSpeed engines for the ranks of a world, and what to ask of them."""

from __future__ import annotations

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
from tests.ranks import everywhere

NAN = float("nan")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Uneven(nn.Module):
    """One large and many tiny parameters, of sizes that no number of ranks divides; one that no loss reaches."""

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


class Never:
    """No optimizer is one."""


@dataclass(frozen=True)
class Setting:
    """How an engine is made.

    Args:
        stage: of ZeRO.
        dtype: a key of `DTYPES`.
        ga: micro-batches of a step.
        more: entries of `zero_optimization`.
        top: entries of the config itself.
        groups: of parameters in the optimizer.
        scale_power: the loss scale at first, as a power of two.
        tolerated: whose rounding to expect, if not that of the dtype.
        fused: let DeepSpeed take the optimizer for its FusedAdam, which has a wrapper of its own at stage 0.
    """

    stage: int
    dtype: str = "fp32"
    ga: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    groups: int = 2
    scale_power: int = 4
    fused: bool = False
    tolerated: str = ""

    @property
    def tolerance(self) -> float:
        return {"fp32": 2e-5, "bf16": 6e-2, "fp16": 6e-3}[self.tolerated or self.dtype]


def quiet_deepspeed() -> Any:
    """DeepSpeed without its compiled communication, and without its warnings about torch 2.13."""
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # It asks for a processor that is fast at it; torch computes in float16 on any.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def engine_of(model: nn.Module, setting: Setting, optimizer: Callable[[Any], Any], mpu: Any = None) -> Any:
    """An engine with a torch optimizer over `groups` groups."""
    deepspeed = quiet_deepspeed()
    params = list(model.parameters())
    cut = len(params) // 2
    groups = [{"params": params[:cut]}, {"params": params[cut:]}] if setting.groups == 2 else [{"params": params}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": setting.ga,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": setting.stage, **setting.more},
        **setting.top,
    }
    if setting.dtype != "fp32":
        config.setdefault(setting.dtype, {"enabled": True})
    if setting.dtype == "fp16":
        config["fp16"] = {"loss_scale": 0, "initial_scale_power": setting.scale_power, "hysteresis": 1} | config["fp16"]
    with mock.patch.object(deepspeed.runtime.engine, "FusedAdam", torch.optim.Optimizer if setting.fused else Never):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(groups), config=config, mpu=mpu)
    return engine


def masters(engine: Any) -> dict[str, Tensor]:
    """The whole float32 parameters by name, in float64; on every rank together."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer, found = engine.optimizer, {}
    kept: dict[int, Tensor] = {}
    if hasattr(optimizer, "fp32_groups_flat"):
        for low, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            parts = flat[: sum(p.numel() for p in low)].split([p.numel() for p in low])
            kept |= {id(p): q.view(p.shape) for p, q in zip(low, parts, strict=True)}
    elif hasattr(optimizer, "fp32_groups"):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            kept |= {id(p): q for p, q in zip(low, high, strict=True)}
    elif engine.zero_optimization_stage() < 3 and not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        # Also where DeepSpeed's look-up is at a loss: with round-robin partitions.
        kept = {id(p): p for p in engine.module.parameters()}
    for name, param in engine.module.named_parameters():
        whole = kept[id(param)] if kept else safe_get_full_fp32_param(param)
        found[name] = whole.detach().double().clone()
    return found


def micro(x: Tensor, y: Tensor, ga: int) -> Sequence[tuple[Tensor, Tensor]]:
    """This rank's rows, micro-batch by micro-batch."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return [(x.chunk(ga)[k].chunk(size)[rank], y.chunk(ga)[k].chunk(size)[rank]) for k in range(ga)]


def backward(engine: Any, x: Tensor, y: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    loss = (engine(x.to(dtype)) - y.to(dtype)).float().square().mean() * factor
    engine.backward(loss)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def step(engine: Any, setting: Setting, seed: int, poison: float | None = None, rank: int = 0) -> None:
    """One step on rows of their own; on one rank the loss may be multiplied by something bad."""
    dtype = DTYPES[setting.dtype]
    x = torch.randn(2, 13, generator=torch.Generator().manual_seed(100 * seed + dist.get_rank()))
    bad = poison is not None and dist.get_rank() == rank
    backward(engine, x, torch.ones(2, 3), dtype, poison if bad else 1.0)  # type: ignore[arg-type]
    engine.step()


def caught(call: Callable[[], Any]) -> tuple[list[str], str]:
    """What distclip warned of in a call, and what it raised; alike on all ranks."""
    raised = ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            call()
        except (DistclipError, RuntimeError) as error:
            raised = f"{type(error).__name__}: {error}"
    said = [str(w.message) for w in seen if w.category is NonFiniteWarning]
    told = everywhere((said, re.sub(r"rank \d+: ", "", raised)))
    assert told == [told[0]] * len(told), told
    return said, raised


def reduced(
    engine: Any, place: int = 0, differs: Callable[[str, Any], bool] = lambda name, param: False
) -> dict[str, Tensor]:
    """The gradients of a stage 0 engine after its all-reduce, every one of the job once, in float64."""
    named = [(name, p) for name, p in engine.module.named_parameters() if p.grad is not None]
    mine = {f"{name}@{place}" if differs(name, p) else name: p.grad.double() for name, p in named}
    return {key: grad for each in everywhere(mine) for key, grad in each.items()}
