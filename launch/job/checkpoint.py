"""Save and resume whole runs, in any layout and on any number of ranks.

State is saved by parameter names, as shards of whole tensors, through torch.distributed.checkpoint. Random state is not
saved. Only the initial weights and the order of the data are random, and both follow from the seed.
"""

import shutil
import sys
import warnings
from collections.abc import Callable
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
from distclip.errors import printable

from .mesh import Ranks
from .models.recurrent import recurrences
from .processes import RANK
from .untrusted import DamagedError, Planner, Reader, UnsafeError, check_checkpoint, read_config

warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized")

# Parameter groups are saved by parameter names because a list of groups would differ between pipeline stages.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)

# A resumed run must have the values of the saved run. All other settings may change.
FIXED_KEYS = ("model", "data", "batch", "seed", "optim._target_", "precision.dtype")


class TrainingState(Protocol):
    """All state that training changes."""

    def save(self, path: Path) -> None:
        """Write the state. Every rank must call it."""

    def load(self, path: Path) -> None:
        """Read the state, or raise on all ranks. Every rank must call it.

        Raises:
            DamagedError: the checkpoint is not whole. UnsafeError: loading it could run code.
        """


@dataclass(frozen=True)
class Source:
    """Run to continue.

    Args:
        run: directory of the run.
        before: if set, only checkpoints of earlier steps count.
    """

    run: Path
    before: int | None = None

    def find_newest(self) -> tuple[int, Path]:
        """Return the step and the path of the newest checkpoint that looks whole, or exit if there is none."""
        return self._find(check_checkpoint)

    def load(self, state: TrainingState) -> int:
        """Load the newest whole checkpoint, and return its step. Every rank must call it."""
        return self._find(lambda path: (check_checkpoint(path), state.load(path)))[0]

    def _find(self, use: Callable[[Path], object]) -> tuple[int, Path]:
        """Return the newest checkpoint that can be used without finding damage."""
        damages = []
        for step, path in list_checkpoints(self.run, self.before):
            damage = _find_damage(path, use)
            if damage is None:
                return step, path
            damages.append(f"{path.name}: {damage}")
            if RANK == 0 and path not in _reported:
                _reported.add(path)
                text = f"resume={self.run}: {path.name} is damaged: {damage}. The checkpoint before it is used instead"
                print(printable(text), file=sys.stderr, flush=True)
        raise SystemExit(f"resume={self.run}: no checkpoint there is whole ({'; '.join(damages)}). Use another run")


_reported: set[Path] = set()


def _find_damage(path: Path, use: Callable[[Path], object]) -> str | None:
    """Use a checkpoint, and return its damage, or None if it is whole."""
    try:
        use(path)
    except DamagedError as error:
        return f"{error}"
    except UnsafeError as error:
        raise SystemExit(
            f"resume={path.parent.parent}: {path.name} is not loaded, because it could run code: {error}. Use a run "
            "whose files are those that this job wrote"
        ) from None
    return None


def list_checkpoints(run: Path, before: int | None = None) -> list[tuple[int, Path]]:
    """Return the steps and the paths of a run's checkpoints, the newest first, or exit if there is none.

    Args:
        before: if set, only checkpoints of earlier steps count.
    """
    saved = _steps_of(run)
    if not saved:
        raise SystemExit(f"resume={run}: no checkpoint there. Use the directory of a run with checkpoint.every=N")
    if before is not None and before <= min(saved):
        raise SystemExit(f"replay={before}: {run} has no checkpoint before this step. Use {min(saved) + 1} or more")
    return [(step, path) for step, path in sorted(saved.items(), reverse=True) if before is None or step < before]


def _steps_of(run: Path) -> dict[int, Path]:
    # Other endings mark checkpoints that a job was writing when it ended.
    return {int(path.name[5:]): path for path in run.glob("checkpoints/step_*") if path.name[5:].isdigit()}


def find_source(cfg: DictConfig, directory: Path | None, *, is_restart: bool) -> Source | None:
    """Return the run to continue, or None to start at step 1, or exit if the settings are ambiguous.

    Args:
        cfg: config of this run.
        directory: directory of this run, if all ranks know it.
        is_restart: an earlier attempt of this job has started the run.
    """
    if cfg.checkpoint.every < 0:
        raise SystemExit(f"checkpoint.every={cfg.checkpoint.every}: negative. Use 0 (no checkpoints) or more")
    own = {} if directory is None else _steps_of(directory)
    if is_restart or cfg.resume == "auto":
        if directory is None:
            raise SystemExit(
                "resume=auto: every job has another run directory by default. Set hydra.run.dir=DIRECTORY, and the job "
                "continues what it finds there"
            )
        # If the run has ended, its last part is repeated, which gives the same results.
        if any(step < cfg.steps for step in own):
            return Source(directory, before=cfg.steps)
        if own and not is_restart:
            raise SystemExit(
                f"resume=auto: {directory} has already trained {max(own)} steps. Use steps={max(own) + 1} or more"
            )
    if cfg.resume in (None, "auto"):
        if own and cfg.resume is None and cfg.checkpoint.every and not is_restart:
            raise SystemExit(
                f"hydra.run.dir={directory}: has the checkpoints of an earlier run. Use resume=auto to continue it, or "
                "another directory"
            )
        return None
    return Source(Path(cfg.resume), cfg.replay)


def first_step(cfg: DictConfig, source: Source | None) -> int:
    """Return the first step of a run, or exit if it cannot be resumed with these settings."""
    if source is None:
        return 1
    run = source.run
    step, _ = source.find_newest()
    if step >= cfg.steps:
        raise SystemExit(f"resume={run}: has already trained {step} steps. Use steps={step + 1} or more")
    saved_cfg = read_config(run, cfg)
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


def check_policy(run: Path, cfg: DictConfig, model: nn.Module, clipper: GradClipper) -> None:
    """Exit if a policy cannot continue from the state that the resumed run's policy has saved.

    The configs are compared through the policies that are built from them, so that a policy with new arguments needs no
    change here.
    """
    saved_cfg = read_config(run, cfg)
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
    raise SystemExit(f"resume={run}: {reason} Use the clip settings of that run: {' '.join(changes)}")


def save(state: TrainingState, run: Path, step: int) -> None:
    """Save a checkpoint. Every rank must call it."""
    path = run / "checkpoints" / f"step_{step:06}"
    # The directory is renamed once it is complete, so that a killed job leaves nothing that looks like a checkpoint.
    unfinished = path.with_suffix(".unfinished")
    state.save(unfinished)
    if RANK == 0:
        replaced = path.with_suffix(".replaced")
        if path.exists():
            # A run that continues from a checkpoint before its newest one repeats steps.
            path.rename(replaced)
        unfinished.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove, on rank 0, checkpoints that a job was writing when it was killed, before any rank saves."""
    for pattern in ("*.unfinished", "*.replaced"):
        for path in run.glob(f"checkpoints/step_{pattern}"):
            shutil.rmtree(path)


def _as_damage(error: BaseException) -> DamagedError:
    if isinstance(error, DamagedError):
        return error
    return DamagedError(f"its tensors cannot be read ({type(error).__name__})")


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
        no_dist = self.ranks.rank_0_saves or not dist.is_initialized()
        try:
            dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=no_dist)
        except dcp.CheckpointException as error:
            # torch raises the errors of all ranks on all ranks.
            errors = [error for error, _ in error.failures.values()]
            raise next((one for one in errors if isinstance(one, UnsafeError)), _as_damage(errors[0])) from None
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
        """Return the state dict to write, or to read into."""
        model, optimizer = get_state_dict(self.module, self.optimizer, options=OPTIONS)
        carried = {}
        for name, part in recurrences(self.module).items():
            states = part.zeros(self.num_rows) if part.state is None else part.state
            for i, state in enumerate((states,) if isinstance(states, Tensor) else states):
                carried[f"{name}.{i}"] = self.ranks.global_state(state)
        state = {"model": model, "optimizer": optimizer, "carried": carried, "clipper": self.clipper}
        return state if self.scaler is None else state | {"scaler": self.scaler}
