"""Distribute a model with a DeepSpeed engine, to which distclip is attached."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distclip
from distclip import GradClipper, Report
from distclip.auditing import Audit
from distclip.comm.consensus import FirstError

from ..checkpoint import TrainingState
from ..data import Criterion
from ..inject import ShardKey
from ..mesh import Ranks
from ..models.recurrent import recurrences
from ..processes import RANK, WORLD_SIZE, gather
from ..untrusted import load_weights, weights_only, write_sizes
from .base import ClippedOptimizer, ParallelModel, StepConfig

_RANK_FILE = f"rank_{RANK}_of_{WORLD_SIZE}.pt"


class DeepSpeedModel(ParallelModel):
    """A model for a DeepSpeed engine. The engine is created together with the optimizer."""

    def __init__(self, module: nn.Module, criterion: Criterion, config: Mapping[str, Any], batch: int) -> None:
        super().__init__(module, criterion)
        self.config, self.batch = config, batch
        self.engine: Any = None
        self.dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.engine(x.to(self.dtype) if x.is_floating_point() else x)
        return out

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def build_optimizer(self, config: StepConfig) -> ClippedOptimizer:
        return DeepSpeedOptimizer(self, config)


class DeepSpeedOptimizer:
    """A DeepSpeed engine whose step uses distclip's norm, policy and non-finite rule."""

    def __init__(self, model: DeepSpeedModel, config: StepConfig) -> None:
        # DeepSpeed logs a screenful of settings while it starts.
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        # This import is here because it takes seconds.
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator

        from distclip.integrations.deepspeed import attach

        deepspeed.utils.logger.setLevel("ERROR")
        if config.device.type == "cpu":
            # DeepSpeed would compile its own collectives, which takes a minute, so gloo's are used instead.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            # DeepSpeed rejects float16 on CPUs without fast float16 instructions. torch computes with it on any CPU.
            get_accelerator().is_fp16_supported = lambda: True
        engine_config = {
            "train_micro_batch_size_per_gpu": model.batch,
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **_precision_config(config.precision),
            **model.config,
        }
        module = model.module
        optimizer = config.optim(module.parameters())
        model.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_config)
        logging.disable(logging.NOTSET)
        model.dtype = getattr(torch, config.precision.dtype)
        self._engine, self._module = model.engine, module
        self._attachment = attach(
            model.engine, config.policy, on_nonfinite=config.on_nonfinite, max_skips=config.max_skips
        )
        self.clipper = self._attachment.clipper

    @property
    def lr(self) -> float:
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Leave the gradients to the engine, which resets them after its step."""

    def step(self) -> Report:
        self._engine.step()
        assert self._attachment.report is not None
        return self._attachment.report

    def audit(self) -> Audit:
        # The engine's optimizer steps its own partitions, which are not the model's parameters.
        return distclip.audit(self.clipper)

    def gradients(self) -> dict[ShardKey, Callable[[], Tensor | None]]:
        coordinates = (RANK,) if self._engine.zero_optimization_stage() else ()
        return {
            (name, coordinates): lambda name=name: self._attachment.gradients().get(name)
            for name in self._attachment.held
        }

    def training_state(self, ranks: Ranks, num_rows: int) -> TrainingState:
        return DeepSpeedState(self._engine, self.clipper, self._module)


@dataclass(frozen=True)
class DeepSpeedState:
    """State of an engine and its clipper, for the same number of ranks and the same ZeRO stage."""

    engine: Any
    clipper: GradClipper
    module: nn.Module

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(str(path), tag="engine", save_latest=False)
        carried = {name: part.state for name, part in recurrences(self.module).items()}
        torch.save({"clipper": self.clipper.state_dict(), "carried": carried}, path / _RANK_FILE)
        # Rank 0 renames the checkpoint after this, so every rank must have written its file.
        gather(None)
        if RANK == 0:
            write_sizes(path)

    def load(self, path: Path) -> None:
        if not (path / _RANK_FILE).exists():
            raise SystemExit(
                f"resume={path}: DeepSpeed's checkpoints fit the number of ranks that saved them, not {WORLD_SIZE}. "
                "Start as many ranks as that run had"
            )
        # DeepSpeed may raise on one rank and wait on another one, so the ranks first check the files, each a part of
        # them.
        errors = FirstError()
        with weights_only(_state_types()):
            with errors:
                for file in sorted(path.glob("**/*.pt"))[RANK::WORLD_SIZE]:
                    load_weights(file)
            for error in gather(errors.error):
                if error is not None:
                    raise error
            self.engine.load_checkpoint(str(path), tag="engine")
        state = load_weights(path / _RANK_FILE)
        self.clipper.load_state_dict(state["clipper"])
        for name, part in recurrences(self.module).items():
            part.state = state["carried"][name]


def _state_types() -> list[Any]:
    """Return the types of DeepSpeed's checkpoints that hold nothing but data."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def zero(
    model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor, config: DictConfig | Mapping[str, Any]
) -> ParallelModel:
    """Prepare a model for DeepSpeed with the engine's settings in `config`."""
    if find_spec("deepspeed") is None:
        raise SystemExit("parallel=zero0 to zero3: DeepSpeed is not installed. Use pip install deepspeed")
    plain: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    return DeepSpeedModel(model, criterion, plain, len(x))


def _precision_config(precision: Any) -> dict[str, Any]:
    """Return the engine's settings for the config group `precision`."""
    if precision.dtype == "bfloat16":
        return {"bf16": {"enabled": True}}
    if precision.dtype == "float16":
        power = int(math.log2(precision.init_scale))
        return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": power, "hysteresis": 1}}
    return {}
