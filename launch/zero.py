"""DeepSpeed: its engine in place of a wrapped model and an optimizer, with distclip attached."""

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

from distclip import GradClipper, Report
from inject import Key
from models import recurrences
from parallel import Criterion, Placed
from processes import RANK, WORLD, gathered
from stepping import Optim, Stepping

_OWN = f"rank_{RANK}_of_{WORLD}.pt"


class Zero(Placed):
    """A model that an engine will hold: what `parallel=zero0` to `zero3` place."""

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

    def stepping(self, *given: Any) -> Stepping:
        return ZeroStepping(self, *given)


class ZeroStepping(Stepping):
    """`engine.step()`, whose norm, policy and decision are distclip's."""

    def __init__(
        self, placed: Zero, optim: Optim, policy: Any, guard: Mapping[str, Any], precision: Any, device: torch.device
    ) -> None:
        # What it says of itself while it starts fills a screen.
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        # Imported here, where it is wanted: it takes seconds.
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator

        from distclip.integrations.deepspeed import attach

        deepspeed.utils.logger.setLevel("ERROR")
        if device.type == "cpu":
            # It would compile collectives of its own for a minute; gloo's will do.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            # It asks for a processor that is fast at float16; torch computes in it on any.
            get_accelerator().is_fp16_supported = lambda: True
        config = {
            "train_micro_batch_size_per_gpu": placed.batch,
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **_precision(precision),
            **placed.config,
        }
        module = placed.module
        placed.engine, *_ = deepspeed.initialize(model=module, optimizer=optim(module.parameters()), config=config)
        logging.disable(logging.NOTSET)
        placed.dtype = getattr(torch, precision.dtype)
        self.engine, self._module = placed.engine, module
        self.attached = attach(placed.engine, policy, **guard)
        self.clipper = self.attached.clipper

    @property
    def lr(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """The engine does so after a step."""

    def step(self) -> Report:
        self.engine.step()
        assert self.attached.report is not None
        return self.attached.report

    def pieces(self) -> dict[Key, Callable[[], Tensor | None]]:
        place = (RANK,) if self.engine.zero_optimization_stage() else ()
        return {(name, place): lambda name=name: self.attached.gradients().get(name) for name in self.attached.held}

    def progress(self, mesh: Any, rows: int) -> Any:
        return ZeroProgress(self.engine, self.clipper, self._module)


@dataclass(frozen=True)
class ZeroProgress:
    """What changes in training, saved as DeepSpeed does: for as many ranks and the same stage."""

    engine: Any
    clipper: GradClipper
    module: nn.Module

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(str(path), tag="engine", save_latest=False)
        carried = {name: part.state for name, part in recurrences(self.module).items()}
        torch.save({"clipper": self.clipper.state_dict(), "carried": carried}, path / _OWN)
        gathered(None)  # rank 0 goes on when all have written

    def load(self, path: Path) -> None:
        if not (path / _OWN).exists():
            raise SystemExit(f"resume={path}: DeepSpeed goes on with as many ranks as have saved it, not {WORLD}")
        self.engine.load_checkpoint(str(path), tag="engine")
        state = torch.load(path / _OWN)
        self.clipper.load_state_dict(state["clipper"])
        for name, part in recurrences(self.module).items():
            part.state = state["carried"][name]


def zero(
    model: nn.Sequential, mesh: DeviceMesh, criterion: Criterion, x: Tensor, config: DictConfig | Mapping[str, Any]
) -> Placed:
    if find_spec("deepspeed") is None:
        raise SystemExit("parallel=zero0 to zero3 are DeepSpeed's, which is not installed: pip install deepspeed")
    plain: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    return Zero(model, criterion, plain, len(x))


def _precision(precision: Any) -> dict[str, Any]:
    if precision.dtype == "bfloat16":
        return {"bf16": {"enabled": True}}
    if precision.dtype == "float16":
        power = int(math.log2(precision.init_scale))
        return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": power, "hysteresis": 1}}
    return {}
