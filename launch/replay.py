"""Was it the data, or a transient fault? One step of a run, done again from its last checkpoint before.

The run's own settings are taken, but for what the command line says: `launch/train.py resume=RUN replay=STEP`.
"""

import math
from itertools import islice
from pathlib import Path

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import checkpoint
from data import Data
from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import read

TOLERANCE = 1e-3
"""Relative: other layouts add up in another order; in the same one the bits are the same."""


def configured(cfg: DictConfig) -> DictConfig:
    """The run's config up to that step, with what the command line changes; or exit saying why it can't be."""
    step = cfg.replay
    if not isinstance(step, int) or step < 1:
        raise SystemExit(f"replay={step}: write the number of a step, 1 or more")
    if cfg.resume is None:
        raise SystemExit(f"replay={step} of which run? Write resume=RUN, a directory with checkpoints")
    run = Path(cfg.resume)
    checkpoint.newest(run, before=step)
    logged(run, step)
    loaded = OmegaConf.load(run / "config.yaml")
    assert isinstance(loaded, DictConfig)
    # Above all the gradient is not spoiled on purpose again.
    loaded.update({"inject": None, "compare": {}, "note": "", "probe": None, "log": cfg.log})
    loaded.checkpoint.every = 0
    hydra = HydraConfig.get()
    keys = [override.split("=")[0].lstrip("+~") for override in hydra.overrides.task]
    if "experiment" in keys:
        raise SystemExit(f"experiment= beside replay={step}: leave it out, the settings are those of {run}")
    for key in keys + ["parallel"] * ("comm" in keys):  # comm=mpi brings its layout
        OmegaConf.update(loaded, key, OmegaConf.select(cfg, key), merge=key not in hydra.runtime.choices)
    loaded.steps = step
    return loaded


def logged(run: Path, step: int) -> tuple[float, float]:
    """The norm and the loss of a step, by the run's log; NaN for what is not finite."""
    try:
        log = read(run)
    except RunError as error:
        raise SystemExit(f"replay={step}: {error}") from None
    (places,) = np.nonzero(log.steps == step)
    if not len(places):
        raise SystemExit(
            f"replay={step} is not in {log.path}, which ends at step {log.steps[-1]}: write a step that is"
        )
    losses = log.columns.get("loss", np.full(len(log.steps), math.nan))
    return float(log.norms[places[0]]), float(losses[places[0]])


def verdict(cfg: DictConfig, data: Data, directory: Path) -> str:
    """What is to be said of the replayed run in `directory`, beside the one it was taken from."""
    step = int(cfg.replay)
    both = list(zip(logged(Path(cfg.resume), step), logged(directory, step), strict=True))
    norm, loss = (alike(then, now) for then, now in both)
    seen = "; ".join(
        f"{key} {shown(then)} then, {shown(now)} now" for key, (then, now) in zip(("norm", "loss"), both, strict=True)
    )
    ids = next(islice(data.train(cfg.seed), step - 1, None)).ids.tolist()
    what = f"the batch ({f'number {ids[0]} of its pass' if len(ids) == 1 else f'samples {str(ids)[1:-1]}'})"
    if norm:
        said = f"The same norm again: {what}, or the state that it met, is to blame, not a transient fault"
    else:
        where = "after the forward pass, whose loss is the same" if loss else "in this step or since the checkpoint"
        said = f"Not again: a transient fault (hardware, a race, something injected), {where}; not {what}"
    return f"step {step}: {seen}. {said}"


def alike(then: float, now: float) -> bool:
    """Within the tolerance; what is not finite is like its kind."""
    return (math.isnan(then) and math.isnan(now)) or math.isclose(then, now, rel_tol=TOLERANCE)


def shown(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else "not finite"
