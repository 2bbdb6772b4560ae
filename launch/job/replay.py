"""Repeat one step of a run from the checkpoint before it, to distinguish bad data from a transient fault.

`launch/train.py resume=RUN replay=STEP` uses the settings of that run, with the changes that the command line makes.
"""

import math
from itertools import islice
from pathlib import Path

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import read

from .checkpoint import list_checkpoints
from .data import Data
from .untrusted import read_config

# Relative. Other layouts sum in another order. The bits are equal in an equal layout.
TOLERANCE = 1e-3


def replay_config(cfg: DictConfig) -> DictConfig:
    """Return the config of the run to repeat, or exit if the step cannot be repeated."""
    step = cfg.replay
    if not isinstance(step, int) or step < 1:
        raise SystemExit(f"replay={step}: not a step. Use the number of a step, 1 or more")
    if cfg.resume is None:
        raise SystemExit(f"replay={step}: needs a run. Use resume=RUN, a run directory with checkpoints")
    run = Path(cfg.resume)
    list_checkpoints(run, before=step)
    read_step(run, step)
    run_cfg = read_config(run, cfg)
    # Above all, the gradient must not be corrupted again.
    run_cfg.update({"inject": None, "compare": {}, "note": "", "probe": None, "log": cfg.log})
    run_cfg.checkpoint.every = 0
    hydra = HydraConfig.get()
    keys = [override.split("=")[0].lstrip("+~") for override in hydra.overrides.task]
    if "experiment" in keys:
        raise SystemExit(f"experiment= with replay={step}: the settings are those of {run}. Omit experiment=")
    # comm=mpi implies its layout.
    for key in keys + ["parallel"] * ("comm" in keys):
        OmegaConf.update(run_cfg, key, OmegaConf.select(cfg, key), merge=key not in hydra.runtime.choices)
    run_cfg.steps = step
    return run_cfg


def read_step(run: Path, step: int) -> tuple[float, float]:
    """Return the norm and the loss of a step from a run's log. A non-finite value is NaN."""
    try:
        log = read(run)
    except RunError as error:
        raise SystemExit(f"replay={step}: {error}") from None
    (positions,) = np.nonzero(log.steps == step)
    if not len(positions):
        raise SystemExit(
            f"replay={step}: not in {log.path}, whose last step is {log.steps[-1]}. Use a step that it contains"
        )
    losses = log.columns.get("loss", np.full(len(log.steps), math.nan))
    return float(log.norms[positions[0]]), float(losses[positions[0]])


def compare(cfg: DictConfig, data: Data, directory: Path) -> str:
    """Compare the repeated step with the original one, and name the probable cause.

    Args:
        directory: run directory of the repetition.
    """
    step = int(cfg.replay)
    old_norm, old_loss = read_step(Path(cfg.resume), step)
    new_norm, new_loss = read_step(directory, step)
    numbers = (
        f"step {step}: norm {_format(old_norm)} then, {_format(new_norm)} now; "
        f"loss {_format(old_loss)} then, {_format(new_loss)} now."
    )
    ids = next(islice(data.train(cfg.seed), step - 1, None)).ids.tolist()
    batch = f"batch number {ids[0]} of its pass" if len(ids) == 1 else f"samples {str(ids)[1:-1]}"
    if is_close(old_norm, new_norm):
        return f"{numbers} The norm is the same: the cause is the batch ({batch}) or the state before it, not a fault"
    # An equal loss shows that the forward pass was correct.
    where = "after the forward pass" if is_close(old_loss, new_loss) else "in this step or since the checkpoint"
    return (
        f"{numbers} The norm differs: the cause was a transient fault (hardware, a race, an injected error) {where}, "
        f"not the batch ({batch})"
    )


def is_close(old: float, new: float) -> bool:
    """Return whether two values agree within the tolerance. NaN agrees with NaN."""
    return (math.isnan(old) and math.isnan(new)) or math.isclose(old, new, rel_tol=TOLERANCE)


def _format(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else "non-finite"
