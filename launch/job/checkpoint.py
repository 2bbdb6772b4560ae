"""Save and resume whole runs, in any layout and on any number of ranks.

State is saved by parameter names, as shards of whole tensors, through torch.distributed.checkpoint. Random state is not
saved. Only the initial weights and the order of the data are random, and both follow from the seed.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from distclip import ArgumentError, GradClipper, LocalComm

from .mesh import Ranks
from .models.recurrent import recurrences
from .processes import RANK

warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized")

# Parameter groups are saved by parameter names because a list of groups would differ between pipeline stages.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)

# A resumed run must have the values of the saved run. All other settings may change.
FIXED_KEYS = ("model", "data", "batch", "seed", "optim._target_", "precision.dtype")


class TrainingState(Protocol):
    """All that training changes."""

    def save(self, path: Path) -> None:
        """Write the state. Every rank must call it."""

    def load(self, path: Path) -> None:
        """Read the state. Every rank must call it."""


def find_newest(run: Path, before: int | None = None) -> tuple[int, Path]:
    """Return the step and the path of a run's newest complete checkpoint, or exit if there is none.

    Args:
        before: if set, only checkpoints of earlier steps count.
    """
    saved = {int(path.name[5:]): path for path in run.glob("checkpoints/step_*") if path.name[5:].isdigit()}
    if not saved:
        raise SystemExit(f"resume={run}: no checkpoint there. Use the directory of a run with checkpoint.every=N")
    if before is not None and before <= min(saved):
        raise SystemExit(f"replay={before}: {run} has no checkpoint before this step. Use {min(saved) + 1} or more")
    return max((step, path) for step, path in saved.items() if before is None or step < before)


def first_step(cfg: DictConfig) -> int:
    """Return the first step of a run, or exit if it cannot be resumed with these settings."""
    if cfg.checkpoint.every < 0:
        raise SystemExit(f"checkpoint.every={cfg.checkpoint.every}: negative. Use 0 (no checkpoints) or more")
    if cfg.resume is None:
        return 1
    run = Path(cfg.resume)
    step, _ = find_newest(run, cfg.replay)
    if step >= cfg.steps:
        raise SystemExit(f"resume={run}: has already trained {step} steps. Use steps={step + 1} or more")
    saved_cfg = OmegaConf.load(run / "config.yaml")
    for key in FIXED_KEYS:
        old, new = OmegaConf.select(saved_cfg, key), OmegaConf.select(cfg, key)
        if old != new:
            raise SystemExit(f"resume={run}: was trained with {key}={old}, not {new}. Use the settings of that run")
    stages = [OmegaConf.select(c, "parallel.place.config.zero_optimization.stage") for c in (saved_cfg, cfg)]
    if stages[0] != stages[1]:
        raise SystemExit(
            f"resume={run}: DeepSpeed's checkpoints fit the ZeRO stage that saved them, {stages[0]}, not {stages[1]} "
            "(null: without DeepSpeed). Use the parallel= of that run"
        )
    return step + 1


def check_policy(cfg: DictConfig, model: nn.Module, clipper: GradClipper) -> None:
    """Exit if a policy cannot continue from the state that the resumed run's policy has saved.

    The saved config is compared through the two policies that are built from the configs, so that a policy with new
    arguments needs no change here.
    """
    if cfg.resume is None:
        return
    saved_cfg = OmegaConf.load(Path(cfg.resume) / "config.yaml")
    changes = [
        f"clip.{key}={saved_cfg.clip.get(key)}"
        for key in sorted({*saved_cfg.clip, *cfg.clip}, key=str)
        if saved_cfg.clip.get(key) != cfg.clip.get(key)
    ]
    try:
        saved = GradClipper(model, instantiate(saved_cfg.clip), comm=LocalComm())
        old, new = saved.policy.spec, clipper.policy.spec
        if (old.norm_type, old.per, old.groups) == (new.norm_type, new.per, new.groups):
            # `load_state_dict` rejects another kind of policy and other shapes.
            clipper.load_state_dict(saved.state_dict())
            return
        reason = "its policy measures other norms."
    except (ArgumentError, InstantiationException) as error:
        reason = f"{error}"
    raise SystemExit(f"resume={cfg.resume}: {reason} Use the clip settings of that run: {' '.join(changes)}")


def save(state: TrainingState, run: Path, step: int) -> None:
    """Save a checkpoint. Every rank must call it."""
    path = run / "checkpoints" / f"step_{step:06}"
    # It is renamed once it is complete, so that a killed job leaves nothing that looks like a checkpoint.
    unfinished = path.with_suffix(".unfinished")
    state.save(unfinished)
    if RANK == 0:
        unfinished.rename(path)


@dataclass(frozen=True)
class ShardedState:
    """State of a torch model, its optimizer, its clipper and its loss scaler."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clipper: GradClipper
    scaler: torch.amp.GradScaler | None
    ranks: Ranks
    num_rows: int
    """Number of rows that this rank has in a batch."""

    def save(self, path: Path) -> None:
        state = self._build()
        if RANK == 0 or not self.ranks.rank_0_saves:
            dcp.save(state, checkpoint_id=path, no_dist=self.ranks.rank_0_saves or not dist.is_initialized())

    def load(self, path: Path) -> None:
        state = self._build()
        dcp.load(state, checkpoint_id=path, no_dist=self.ranks.rank_0_saves or not dist.is_initialized())
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=OPTIONS,
        )
        for name, part in recurrences(self.module).items():
            count = len(part.zeros(0))
            states = tuple(self.ranks.local_state(state["carried"][f"{name}.{i}"]) for i in range(count))
            part.state = states if isinstance(part.cell, nn.LSTM) else states[0]

    def _build(self) -> dict[str, Any]:
        """Return the state dict that is written, or read into."""
        model, optimizer = get_state_dict(self.module, self.optimizer, options=OPTIONS)
        carried = {}
        for name, part in recurrences(self.module).items():
            states = part.zeros(self.num_rows) if part.state is None else part.state
            for i, state in enumerate((states,) if isinstance(states, Tensor) else states):
                carried[f"{name}.{i}"] = self.ranks.global_state(state)
        state = {"model": model, "optimizer": optimizer, "carried": carried, "clipper": self.clipper}
        return state if self.scaler is None else state | {"scaler": self.scaler}
