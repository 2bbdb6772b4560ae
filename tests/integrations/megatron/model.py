"""Megatron-core on CPUs: a small model of real layers on gloo groups, with gradients that every rank can make up."""

from __future__ import annotations

import gc
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.ranks import everywhere

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 0.5
SCALE = 256.0


@dataclass(frozen=True)
class Setting:
    """How a job is laid out.

    Args:
        tp, pp, ep, etp: sizes of the parallel groups; the rest is data parallel.
        dtype: a key of `DTYPES`.
        distributed: with DistributedOptimizer.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dtype: str = "fp32"
    distributed: bool = False


class AsIfCuda(TorchFunctionMode):
    """Megatron asks for tensors on "cuda" and for their type by name: it gets them on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **kwargs)
        asked_for_type = func is torch.Tensor.type and len(args) == 1
        return out.replace("torch.", "torch.cuda.") if asked_for_type else out


@contextmanager
def megatron(setting: Setting) -> Iterator[None]:
    """Its groups, and a CPU that it takes for a GPU."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    here = mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu"))
    with warnings.catch_warnings(), here, AsIfCuda():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state

        # Groups end with the last who holds them: models of the job before. Nothing that stays is searched again.
        gc.collect()
        gc.freeze()
        parallel_state.initialize_model_parallel(
            setting.tp,
            setting.pp,
            expert_model_parallel_size=setting.ep,
            expert_tensor_parallel_size=setting.etp,
        )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            # It leaves the groups, each with threads of its own.
            for group in list(dist.distributed_c10d._world.pg_map):
                if group is not dist.group.WORLD:
                    dist.destroy_process_group(group)


class Places:
    """Where this rank stands, asked of Megatron."""

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

        self.tp, self.pp = state.get_tensor_model_parallel_rank(), state.get_pipeline_model_parallel_rank()
        self.ep = state.get_expert_model_parallel_rank()


def made(setting: Setting, trained: bool = True) -> Any:
    """A stage of the model, wrapped in Megatron's DistributedDataParallel."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import MegatronModule, TransformerConfig

    dtype, place = DTYPES[setting.dtype], Places()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=2 if setting.ep > 1 else None,
        add_bias_linear=setting.ep == 1,
        use_cpu_initialization=True,
        tensor_model_parallel_size=setting.tp,
        expert_model_parallel_size=setting.ep,
        expert_tensor_parallel_size=setting.etp,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        bf16=setting.dtype == "bf16",
        fp16=setting.dtype == "fp16",
    )
    shared = {"config": config, "init_method": nn.init.normal_}

    class Stage(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.up = ColumnParallelLinear(8, 12, gather_output=False, **shared)
            self.down = RowParallelLinear(12, 8, bias=True, input_is_parallel=True, skip_bias_add=False, **shared)
            self.norm = nn.LayerNorm(8, dtype=dtype)
            if setting.pp > 1:
                # Megatron ties the embedding of the first stage to the last one's output layer, of another name.
                self.add_module(
                    "tied_output" if place.pp else "tied",
                    ColumnParallelLinear(8, 10, bias=False, gather_output=False, **shared),
                )
            if place.pp == 1:
                # So that a distributed optimizer cuts this stage elsewhere than the other.
                self.more = nn.Parameter(torch.zeros(37, dtype=dtype))
            if setting.ep > 1:
                group = parallel_state.get_expert_tensor_parallel_group()
                self.expert = ColumnParallelLinear(
                    8, 6, bias=False, gather_output=False, is_expert=True, tp_group=group, **shared
                )
                self.expert_scale = nn.Parameter(torch.zeros(5, dtype=dtype))
                self.expert_scale.allreduce = False

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(self.norm(x))[0]))[0]

    stage = Stage().requires_grad_(trained)
    with torch.no_grad():
        for name, param in stage.named_parameters():
            if "tied" in name:
                param.shared_embedding = True
                if place.pp:
                    param.shared = True
            param.copy_(piece(name, param, setting, "weights") * 0.1)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=setting.distributed)
    return DistributedDataParallel(config, ddp, stage)


def optimizer_of(model: Any, setting: Setting, **more: Any) -> Any:
    """Megatron's own, whose step is p - LR · g: so is Adam's with an eps beyond all gradients and no momentum."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    how: dict[str, Any] = {"optimizer": "sgd", "lr": LR, "sgd_momentum": 0.0}
    if setting.distributed:
        how = {"optimizer": "adam", "lr": LR * 1e9, "adam_eps": 1e9, "adam_beta1": 0.0}
    config = OptimizerConfig(
        **{"weight_decay": 0.0, "clip_grad": 1.0, **how, **more},
        params_dtype=DTYPES[setting.dtype],
        bf16=setting.dtype == "bf16",
        fp16=setting.dtype == "fp16",
        initial_loss_scale=SCALE,
        min_loss_scale=1.0,
        hysteresis=1,
        use_distributed_optimizer=setting.distributed,
    )
    return get_megatron_optimizer(config, [model])


def whole(name: str, shape: tuple[int, ...], what: str, stage: int, expert: int) -> Tensor:
    """A whole parameter or gradient."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{what} {key_of(name, stage, expert)}".encode()))
    return torch.randn(shape, generator=generator) * 3


def key_of(name: str, stage: int, expert: int) -> str:
    """What tells a parameter of the whole model from all others; a tied one is the same on both stages."""
    if "tied" in name:
        return "tied.weight"
    return name + (f" of stage {stage}" if stage else "") + (f" of expert {expert}" if "expert" in name else "")


def shape_of(name: str, param: Tensor, setting: Setting) -> tuple[int, ...]:
    """Of the whole parameter."""
    shape = list(param.shape)
    if getattr(param, "tensor_model_parallel", False):
        shape[param.partition_dim] *= setting.etp if "expert" in name else setting.tp
    return tuple(shape)


def piece(name: str, param: Tensor, setting: Setting, what: str) -> Tensor:
    """This rank's part of a whole."""
    place = Places()
    return part_of(whole(name, shape_of(name, param, setting), what, place.pp, place.ep), name, param, setting)


def part_of(full: Tensor, name: str, param: Tensor, setting: Setting) -> Tensor:
    """This rank's part of what is given."""
    size = setting.etp if "expert" in name else setting.tp
    if size > 1 and getattr(param, "tensor_model_parallel", False):
        return full.chunk(size, param.partition_dim)[Places().tp]
    return full


def wholes(model: Any, setting: Setting, what: str = "gradients") -> dict[str, Tensor]:
    """Every parameter or gradient of the whole model once, by `key_of`; the ranks tell each other what they have."""
    place = Places()
    mine = [
        (name, shape_of(name, param, setting), what, place.pp, place.ep)
        for name, param in model.module.named_parameters()
    ]
    return {key_of(one[0], one[3], one[4]): whole(*one) for each in everywhere(mine) for one in each}


def fill(
    model: Any,
    setting: Setting,
    change: Callable[[str, Tensor], Tensor] = lambda name, grad: grad,
    what: str = "gradients",
    scale: float | None = None,
) -> None:
    """Lay gradients where Megatron's backward leaves them, reduced over data-parallel ranks, times the loss scale."""
    if scale is None:
        scale = SCALE if setting.dtype == "fp16" else 1.0
    for name, param in model.module.named_parameters():
        if param.requires_grad:
            param.main_grad.copy_(change(name, piece(name, param, setting, what) * scale))
