"""Checkpoints of whole runs, which go on in any layout and on any number of ranks.

Everything goes by names, and as pieces of whole tensors, through torch.distributed.checkpoint. Of randomness there is
nothing to save: it ends with the first weights and the order of the data, which come from the seed.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distclip import GradClipper
from distclip.comm.mpi import MPIComm
from layout import data_axes, local
from models import recurrences
from processes import RANK

warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized")

# Parameter groups by parameter names: a list of groups would differ between pipeline stages.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
SAME = ("model", "data", "batch", "seed", "optim._target_", "precision.dtype")
SAME_CLIP = ("clip._target_", "clip.norm_type", "clip.per", "clip.window", "clip.restart_after", "clip.groups")


def newest(run: Path, before: int | None = None) -> tuple[int, Path]:
    """The last step of a run (before a certain one) that was saved completely, and where."""
    saved = {int(path.name[5:]): path for path in run.glob("checkpoints/step_*") if path.name[5:].isdigit()}
    if not saved:
        raise SystemExit(f"resume={run} has no checkpoint: write the directory of a run with checkpoint.every=N")
    if before is not None and before <= min(saved):
        first = min(saved) + 1
        raise SystemExit(f"replay={before}: {run} has no checkpoint before it: write {first} or more")
    return max((step, path) for step, path in saved.items() if before is None or step < before)


def check(cfg: DictConfig) -> int:
    """At which step to start, having refused what cannot go on from there."""
    if cfg.checkpoint.every < 0:
        raise SystemExit(f"checkpoint.every={cfg.checkpoint.every}: write 0 (never) or more")
    if cfg.resume is None:
        return 1
    run = Path(cfg.resume)
    step, _ = newest(run, cfg.replay)
    if step >= cfg.steps:
        raise SystemExit(f"resume={run} is through step {step} already: write steps={step + 1} or more")
    before = OmegaConf.load(run / "config.yaml")
    for key in (*SAME, *SAME_CLIP):
        then, now = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        if then != now:
            raise SystemExit(f"resume={run} was trained with {key}={then}, and not {now}: write the same")
    stages = [OmegaConf.select(c, "parallel.place.config.zero_optimization.stage") for c in (before, cfg)]
    if stages[0] != stages[1]:
        raise SystemExit(
            f"resume={run}: DeepSpeed saves in a way of its own, for the same stage (then {stages[0]}, now "
            f"{stages[1]}; null: without it): write the parallel= of that run"
        )
    return step + 1


def save(progress: Any, run: Path, step: int) -> None:
    """It gets its name once it is complete: what a killed job leaves is never taken for a checkpoint."""
    path = run / "checkpoints" / f"step_{step:06}"
    unfinished = path.with_suffix(".unfinished")
    progress.save(unfinished)
    if RANK == 0:
        unfinished.rename(path)


@dataclass(frozen=True)
class Progress:
    """All that changes in training, to be saved and loaded."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clipper: GradClipper
    scaler: torch.amp.GradScaler | None
    mesh: DeviceMesh | MPIComm | None
    rows: int
    """Of the batch, on this rank."""

    def save(self, path: Path) -> None:
        state = self._state()
        if RANK == 0 or not self._copied:
            dcp.save(state, checkpoint_id=path, no_dist=self._copied or not dist.is_initialized())

    def load(self, path: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=path, no_dist=self._copied or not dist.is_initialized())
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=OPTIONS,
        )
        for name, part in recurrences(self.module).items():
            carried = tuple(self._own(state["carried"][f"{name}.{i}"]) for i in range(len(part.zeros(0))))
            part.state = carried if isinstance(part.cell, nn.LSTM) else carried[0]

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer, options=OPTIONS)
        carried = {}
        for name, part in recurrences(self.module).items():
            states = part.zeros(self.rows) if part.state is None else part.state
            for i, state in enumerate((states,) if isinstance(states, Tensor) else states):
                carried[f"{name}.{i}"] = self._whole(state)
        state = {"model": model, "optimizer": optimizer, "carried": carried, "clipper": self.clipper}
        return state if self.scaler is None else state | {"scaler": self.scaler}

    def _whole(self, state: Tensor) -> Tensor:
        """A carried state as this rank's piece of that of the global batch."""
        if isinstance(self.mesh, MPIComm):
            return torch.cat(self.mesh.gather_objects(state), dim=1)
        axes = data_axes(self.mesh) if self.mesh is not None else ()
        if not axes:
            return state
        return DTensor.from_local(state, self.mesh[axes], [Shard(1)] * len(axes), run_check=False)

    def _own(self, state: Tensor) -> Tensor:
        """The reverse of `_whole`."""
        return state.chunk(self.mesh.size, dim=1)[self.mesh.rank] if isinstance(self.mesh, MPIComm) else local(state)

    @property
    def _copied(self) -> bool:
        """Whether every rank has all there is, and no torch.distributed to save it together."""
        return isinstance(self.mesh, MPIComm)
