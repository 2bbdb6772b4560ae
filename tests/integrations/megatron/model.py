"""Build a small model of Megatron-core layers on CPUs, with gradients that every rank can compute."""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.ranks import gather_from_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 0.5
SCALE = 256.0


@dataclass(frozen=True)
class Setting:
    """Layout of a job.

    Args:
        tp, pp, ep, etp: sizes of the parallel groups. Other ranks are data parallel.
        dtype: a key of `DTYPES`.
        distributed: use DistributedOptimizer.
        layer_wise: use LayerWiseDistributedOptimizer.
        precision_aware: let the optimizer keep the float32 weights, and read gradients of another dtype.
        fsdp: wrap the model in Megatron-FSDP with this sharding strategy.
        instances: number of replicas of the sharded model.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dtype: str = "fp32"
    distributed: bool = False
    layer_wise: bool = False
    precision_aware: bool = False
    fsdp: str = ""
    instances: int = 1


class FusedAdam(torch.optim.Optimizer):
    """Stand-in for TransformerEngine's optimizer, which needs a GPU. It steps as Adam with a huge eps does."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        exp_avg_dtype: Any,
        exp_avg_sq_dtype: Any,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        master_weight_dtype: Any = None,
        store_param_remainders: bool = False,
    ) -> None:
        assert master_weights
        assert use_decoupled_grad
        super().__init__(params, {"lr": lr, "eps": eps})

    def master_of(self, param: Tensor) -> Tensor:
        """Return the float32 copy of a parameter."""
        state = self.state[param]
        if "master_param" not in state:
            state["master_param"] = param.detach().float().clone()
        master: Tensor = state["master_param"]
        return master

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                assert param.grad is None
                if param.decoupled_grad is not None:
                    master = self.master_of(param)
                    master -= group["lr"] / group["eps"] * param.decoupled_grad.float()
                    param.copy_(master)


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Let Megatron find the stand-in for TransformerEngine's optimizer."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules[names[0]].__version__ = "2.9.0"
    modules[names[2]].FusedAdam = FusedAdam
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(optimizer, "Adam", FusedAdam),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        mock.patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", False),
        mock.patch("megatron.core.utils._te_version", None),
    ):
        yield


class AsIfCuda(TorchFunctionMode):
    """Create tensors for "cuda" on the CPU. Megatron asks for that device, and for types by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device and str(args[0]).startswith("cuda"):
            return torch.device("cpu")
        if not kwargs:
            result = func(*args)
            is_type_name = func is torch.Tensor.type and len(args) == 1
            return result.replace("torch.", "torch.cuda.") if is_type_name else result
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextmanager
def megatron(setting: Setting) -> Iterator[None]:
    """Create Megatron's groups, on a CPU that it takes for a GPU."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    on_cpu = mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu"))
    with warnings.catch_warnings(), on_cpu, AsIfCuda():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state

        new_group = partial(group_of, parallel_state.create_group)
        with mock.patch.object(parallel_state, "create_group", new_group):
            parallel_state.initialize_model_parallel(
                setting.tp,
                setting.pp,
                expert_model_parallel_size=setting.ep,
                expert_tensor_parallel_size=setting.etp,
                num_distributed_optimizer_instances=setting.instances,
            )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            # Megatron-FSDP and a layer-wise optimizer leave other groups, each with several threads.
            kept = {dist.group.WORLD, *_groups.values()}
            for group in list(dist.distributed_c10d._world.pg_map):
                if group not in kept and group.group_desc != "distclip":
                    dist.destroy_process_group(group)


_groups: dict[Any, Any] = {}
"""Groups of this process by their ranks and by what Megatron has them for."""


def group_of(create: Callable[..., Any], ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return a group of Megatron, which a job before this one may have created: it takes longer than most tests."""
    key = tuple(ranks), args, str(sorted(kwargs.items()))
    if key not in _groups:
        _groups[key] = create(ranks, *args, **kwargs)
    return _groups[key]


class Coordinates:
    """Index of this rank along the axes of the job."""

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

        self.tp, self.pp = state.get_tensor_model_parallel_rank(), state.get_pipeline_model_parallel_rank()
        self.ep = state.get_expert_model_parallel_rank()


def build_model(setting: Setting, trained: bool = True) -> Any:
    """Build this rank's stage of the model, wrapped in Megatron's DistributedDataParallel or Megatron-FSDP."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import MegatronModule, TransformerConfig

    dtype, coordinates = DTYPES[setting.dtype], Coordinates()
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
                # Megatron ties the first stage's embedding to the last stage's output layer, which has another name.
                self.add_module(
                    "tied_output" if coordinates.pp else "tied",
                    ColumnParallelLinear(8, 10, bias=False, gather_output=False, **shared),
                )
            if coordinates.pp == 1:
                # A distributed optimizer then cuts this stage at other elements than the first.
                self.more = nn.Parameter(torch.zeros(37, dtype=dtype))
            if setting.ep > 1:
                group = parallel_state.get_expert_tensor_parallel_group()
                experts = ColumnParallelLinear(
                    8, 6, bias=False, gather_output=False, is_expert=True, tp_group=group, **shared
                )
                experts.scale = nn.Parameter(torch.zeros(5, dtype=dtype))
                experts.scale.allreduce = False
                # Megatron-FSDP knows experts by this name.
                self.moe = nn.ModuleDict({"experts": experts})

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(self.norm(x))[0]))[0]

    stage = Stage().requires_grad_(trained)
    with torch.no_grad():
        for name, param in stage.named_parameters():
            if "tied" in name:
                param.shared_embedding = True
                if coordinates.pp:
                    param.shared = True
            param.copy_(local_part_of(name, param, setting, "weights") * 0.1)
    if setting.fsdp:
        model = _fully_sharded(config, setting.fsdp, setting.instances, stage)
        # Megatron-core 0.16 reads it, and later versions have a setting for it.
        model.param_and_grad_buffer.use_precision_aware_optimizer = setting.precision_aware
        return model
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=setting.distributed)
    return DistributedDataParallel(config, ddp, stage)


def _fully_sharded(config: Any, strategy: str, instances: int, stage: Any) -> Any:
    """Wrap a stage in Megatron-FSDP, which creates meshes of GPUs and looks for layers of TransformerEngine."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter

    ddp = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=strategy,
        use_distributed_optimizer=True,
        num_distributed_optimizer_instances=instances,
        grad_reduce_in_fp32=True,
        overlap_param_gather=True,
        gradient_reduce_div_fusion=False,  # gloo cannot scale while it reduces
    )
    from_group = adapter.DeviceMesh.from_group

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return from_group(*args, **{**kwargs, "device_type": "cpu"})

    with (
        mock.patch.object(adapter.DeviceMesh, "from_group", on_cpu),
        mock.patch.object(adapter, "TELinear", torch.nn.Identity),
        mock.patch.object(adapter.FullyShardedDataParallel, "sync_rng_states_across_tp_group"),
        mock.patch.object(torch.cuda, "Stream"),
        mock.patch.object(torch.cuda, "empty_cache"),
    ):
        units = [type(stage.up), type(stage.down)]
        return adapter.FullyShardedDataParallel(config, ddp, stage, fsdp_unit_modules=units, device=torch.device("cpu"))


def build_optimizer(model: Any, setting: Setting, **options: Any) -> Any:
    """Build Megatron's optimizer with the step p - LR · g. Adam makes it too with a huge eps and no momentum."""
    arguments: dict[str, Any] = {"optimizer": "sgd", "lr": LR, "sgd_momentum": 0.0}
    if setting.distributed:
        arguments = {"optimizer": "adam", "lr": LR * 1e9, "adam_eps": 1e9, "adam_beta1": 0.0}
    if setting.precision_aware:
        arguments["use_precision_aware_optimizer"] = True
    with transformer_engine() if setting.precision_aware else nullcontext():
        return _build_optimizer(model, setting, {**arguments, **options})


def _build_optimizer(model: Any, setting: Setting, arguments: dict[str, Any]) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        **{"weight_decay": 0.0, "clip_grad": 1.0, **arguments},
        params_dtype=DTYPES[setting.dtype],
        bf16=setting.dtype == "bf16",
        fp16=setting.dtype == "fp16",
        initial_loss_scale=SCALE,
        min_loss_scale=1.0,
        hysteresis=1,
        use_distributed_optimizer=setting.distributed,
    )
    if not setting.layer_wise:
        return get_megatron_optimizer(config, [model])
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    # As for Muon: it makes the copies in float32 itself, of the parameters of torch's optimizers.
    config.bf16 = False
    members = get_megatron_optimizer(config, [model]).chained_optimizers
    config.bf16 = setting.dtype == "bf16"
    groups = ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
    optimizer: Any = LayerWiseDistributedOptimizer(
        [member.optimizer if config.bf16 else member for member in members], config, groups
    )
    # gloo cannot gather tensors of unequal sizes.
    optimizer.allgather_params = optimizer.broadcast_params
    return optimizer


def full_tensor(name: str, shape: tuple[int, ...], kind: str, stage: int, expert: int) -> Tensor:
    """Return a full parameter or gradient. `kind` is "weights" or "gradients"."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {key_of(name, stage, expert)}".encode()))
    return torch.randn(shape, generator=generator) * 3


def key_of(name: str, stage: int, expert: int) -> str:
    """Return a unique name in the full model. A tied parameter has one name on both stages."""
    if "tied" in name:
        return "tied.weight"
    return name + (f" of stage {stage}" if stage else "") + (f" of expert {expert}" if "expert" in name else "")


def shape_of(name: str, param: Tensor, setting: Setting) -> tuple[int, ...]:
    """Return the shape of the full parameter."""
    shape = list(param.shape)
    if getattr(param, "tensor_model_parallel", False):
        shape[param.partition_dim] *= setting.etp if "expert" in name else setting.tp
    return tuple(shape)


def local_part_of(name: str, param: Tensor, setting: Setting, kind: str) -> Tensor:
    """Return this rank's part of a full parameter or gradient."""
    coordinates = Coordinates()
    full = full_tensor(name, shape_of(name, param, setting), kind, coordinates.pp, coordinates.ep)
    return cut(full, name, param, setting)


def cut(full: Tensor, name: str, param: Tensor, setting: Setting) -> Tensor:
    """Return this rank's part of a full tensor."""
    size = setting.etp if "expert" in name else setting.tp
    if size > 1 and getattr(param, "tensor_model_parallel", False):
        return full.chunk(size, param.partition_dim)[Coordinates().tp]
    return full


def full_tensors(model: Any, setting: Setting, kind: str = "gradients") -> dict[str, Tensor]:
    """Return every parameter or gradient of the full model once, by `key_of`. Call it on every rank."""
    coordinates = Coordinates()
    local = [
        (name, shape_of(name, param, setting), kind, coordinates.pp, coordinates.ep)
        for name, param in model.module.named_parameters()
    ]
    entries = [entry for of_rank in gather_from_ranks(local) for entry in of_rank]
    return {key_of(name, pp, ep): full_tensor(name, shape, kind, pp, ep) for name, shape, kind, pp, ep in entries}


def fill(
    model: Any,
    setting: Setting,
    change: Callable[[str, Tensor], Tensor] = lambda name, grad: grad,
    kind: str = "gradients",
    scale: float | None = None,
) -> None:
    """Write gradients where Megatron's backward leaves them, reduced over data-parallel ranks, with the loss scale."""
    if scale is None:
        scale = SCALE if setting.dtype == "fp16" else 1.0
    for name, param in model.module.named_parameters():
        if param.requires_grad:
            param.main_grad.copy_(change(name, local_part_of(name, param, setting, kind) * scale))
