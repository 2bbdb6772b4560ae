"""Repeat one step of a run from the checkpoint before it, to distinguish bad data from a transient fault.

`launch/train.py resume=RUN replay=STEP` uses the settings of that run, with the changes from the command line.
"""

import json
import math
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from distclip.monitor.analysis.errors import RunError
from distclip.monitor.analysis.log import read
from distclip.monitor.examine import write_examination
from distclip.monitor.sample_norms import PerSample

from .checkpoint import list_checkpoints
from .data import Batch, Data
from .processes import RANK, gather
from .untrusted import read_config

# A sample is named as the cause if its part of the gradient is at least this many times the median part.
SAMPLE_FACTOR = 4.0

NUM_SAMPLES = 10

# This is a relative tolerance. Another layout sums in another order. In the same layout the bits are equal.
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
    # Most importantly, the gradient must not be corrupted again.
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
        sample = _describe_sample(directory / "spikes" / f"{step}.json")
        cause = f"the cause is the batch ({batch}) or the state before it, not a fault"
        return f"{numbers} The norm is the same: {cause}{sample}"
    # An equal loss shows that the forward pass was correct.
    where = "after the forward pass" if is_close(old_loss, new_loss) else "in this step or since the checkpoint"
    return (
        f"{numbers} The norm differs: the cause was a transient fault (hardware, a race, an injected error) {where}, "
        f"not the batch ({batch})"
    )


def record_samples(samples: PerSample, step: int, batch: Batch, rows: Tensor, directory: Path) -> None:
    """Write each sample's part of the gradient to spikes/STEP.json. All ranks call it.

    Args:
        samples: samples of this rank.
        batch: batch of all ranks.
        rows: rows of the batch that this rank has.
        directory: run directory of the repetition.
    """
    local = [
        {
            "row": int(row),
            "id": batch.ids[row].item() if len(batch.ids) == len(batch.x) else None,
            "norm": norm,
            "position": samples.position(i),
            "token": samples.token(i),
        }
        for i, (row, norm) in enumerate(zip(rows, samples.norms.tolist(), strict=True))
    ]
    # Tensor-parallel ranks have the same rows.
    by_row = {sample["row"]: sample for part in gather(local) for sample in part}
    if RANK == 0:
        listed = sorted(by_row.values(), key=_norm_of, reverse=True)
        content = {"step": step, "median_sample_norm": median(map(_norm_of, listed)), "samples": listed[:NUM_SAMPLES]}
        write_examination(content, directory)


def _norm_of(sample: dict[str, float]) -> float:
    norm = sample["norm"]
    return norm if math.isfinite(norm) else math.inf


def _describe_sample(path: Path) -> str:
    """Return a sentence about the sample with the largest part, or nothing without measurements."""
    if not path.exists():
        return ""
    content = json.loads(path.read_text())
    worst, usual = content["samples"][0], content["median_sample_norm"]
    name = f"row {worst['row']} of the batch" if worst["id"] is None else f"sample {worst['id']}"
    if worst["position"] is not None:
        name += f" (position {worst['position']}" + (
            f", token {worst['token']})" if worst["token"] is not None else ")"
        )
    if worst["norm"] is None:
        return f". The part of {name} in the gradient is not finite"
    ratio = worst["norm"] / usual if usual else math.inf
    if ratio < SAMPLE_FACTOR:
        return f". No sample stands out: the largest part, of {name}, is {ratio:.2g} times the median part"
    return f". The largest part of the gradient is that of {name}, {ratio:.3g} times the median part"


def is_close(old: float, new: float) -> bool:
    """Return whether two values agree within the tolerance. NaN agrees with NaN."""
    return (math.isnan(old) and math.isnan(new)) or math.isclose(old, new, rel_tol=TOLERANCE)


def _format(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else "non-finite"
