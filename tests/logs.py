"""Make runs with known answers: lines as a recorder writes them, and logs in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distclip.monitor.analysis.log import Log, read
from distclip.monitor.analysis.spikes import Culprit, Spike

HEADER: Mapping[str, Any] = {"distclip": "0.0", "format": 1, "slots": ["model"], "batch": 16, "precision": "fp32"}
"""A recorder's header."""

Floats = NDArray[np.float64]


def steady_norms(steps: int, seed: int = 0, scatter: float = 0.25) -> Floats:
    """Return the norms of an uneventful run."""
    return np.exp(np.random.default_rng(seed).normal(0, scatter, steps))


def make_line(step: int, norm: float, bound: float = 10.0, **fields: Any) -> dict[str, Any]:
    """Return a step's line, as a recorder writes it for a fixed bound."""
    finite = math.isfinite(norm)
    coef = min(1.0, bound / norm) if finite else 1.0
    line = {"step": step, "norm": norm, "bound": bound, "coef": coef, "clipped": coef < 1, "finite": finite}
    return {**line, "skipped": not finite, "loss": 2.0, "lr": 0.1, **fields}


def make_lines(
    norms: ArrayLike, fields_of: Callable[[int], Mapping[str, Any]] = lambda step: {}, **fields: Any
) -> list[Any]:
    """Return lines from step 1 on.

    Args:
        norms: one per step.
        fields_of: further fields of a step.
        fields: further fields of every step, and `bound`.
    """
    values = enumerate(np.asarray(norms, float).tolist(), 1)
    return [make_line(step, norm, **{**fields, **fields_of(step)}) for step, norm in values]


def make_bad_data_lines(epochs: int = 60, samples: int = 360, batch: int = 16, bad: int = 137) -> list[Any]:
    """Return a run over shuffled samples of which one is corrupted. The recorder also keeps some ordinary steps."""
    generator = np.random.default_rng(0)
    lines: list[Any] = []
    for _ in range(epochs):
        order = generator.permutation(samples)
        for ids in order[: samples // batch * batch].reshape(-1, batch).tolist():
            norm, fields = float(np.exp(generator.normal(0, 0.25))), {}
            if bad in ids:
                rank = ids.index(bad) * 2 // batch
                norm *= 30
                fields = {"spike": norm, "ids": ids, "worst": {"rank": rank, "tensor": "2.weight", "share": 0.9}}
            elif len(lines) in (0, 1, 5, 40):
                fields = {"spike": 1.5, "ids": ids}
            lines.append(make_line(len(lines) + 1, norm, **fields))
    return lines


def write_run(directory: Path, *parts: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write a run directory with headers and lists of lines, one after another."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [line for part in parts for line in ([part] if isinstance(part, Mapping) else part)]
    text = "".join(json.dumps(_replace_nan(line), allow_nan=False) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def append(run: Path, *lines: Mapping[str, Any], text: str = "") -> None:
    """Append lines to the file of a run, and text that need not be a whole line."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(_replace_nan(line), allow_nan=False) + "\n" for line in lines) + text)


def make_launched(directory: Path, checkpoint: int | None = 1) -> Path:
    """Make a run directory look like one of launch/train.py, with a checkpoint at a step."""
    text = "clip: {}\nparallel: {}\ncheckpoint: {}\nreplay: null\n"
    (directory / "config.yaml").write_text(text)
    if checkpoint is not None:
        (directory / "checkpoints" / f"step_{checkpoint:06}").mkdir(parents=True)
    return directory


def write_and_read(directory: Path, *parts: Mapping[str, Any] | Sequence[Any]) -> Log:
    """Write a run directory, and read it."""
    return read(write_run(directory, *parts))


def make_log(norms: ArrayLike, **columns: Any) -> Log:
    """Return a log in memory.

    Args:
        norms: one per step.
        columns: further fields of the log.
    """
    values = np.asarray(norms, np.float64)
    finite = np.isfinite(values)
    size = len(values)
    fields: dict[str, Any] = {
        "name": "run",
        "path": Path("run/metrics.jsonl"),
        "header": {},
        "steps": np.arange(1, size + 1),
        "norms": np.where(finite, values, np.nan),
        "bounds": np.full(size, np.nan),
        "coefs": np.ones(size),
        "clipped": np.zeros(size, np.bool_),
        "finite": finite,
        "skipped": np.zeros(size, np.bool_),
    }
    return Log(**{**fields, **columns})


def make_full_log(
    size: int = 400, name: str = "run", bound: float = 1.0, seed: int = 0, suffix: str = "", **columns: Any
) -> Log:
    """Return a log with everything that a run can have: a spike, skipped and non-finite steps, tensors, columns.

    Args:
        size: number of steps.
        name: of the run.
        bound: that clips it.
        seed: of the norms.
        suffix: appended to each string of the log.
        columns: further fields of the log.
    """
    random = np.random.default_rng(seed)
    norms = np.exp(random.normal(-0.5, 0.3, size))
    spike, nonfinite = size // 2, size // 3
    norms[spike], norms[nonfinite] = 37.0, np.nan
    finite = np.isfinite(norms)
    coefs = np.where(finite, np.minimum(1.0, bound / norms), 1.0)
    skipped = ~finite
    skipped[spike] = True
    tensors = tuple(f"layers.{i}.weight{suffix}" for i in range(6))
    fields: dict[str, Any] = {
        "name": name + suffix,
        "header": {"policy": f"NormPolicy(…){suffix}", "batch": 20, f"site{suffix}": "here"},
        "bounds": np.full(size, bound),
        "coefs": coefs,
        "clipped": coefs < 1,
        "skipped": skipped,
        "columns": {
            "loss": 2 + np.exp(-np.arange(size) / 50),
            "lr": np.full(size, 0.1),
            f"tokens{suffix}": np.arange(size) * 1e3,
        },
        "tensors": tensors,
        "tensor_steps": np.arange(1, size + 1, 4),
        "tensor_norms": np.exp(random.normal(0, 1, (len(range(0, size, 4)), len(tensors)))),
        "spikes": (
            Spike(nonfinite + 1, math.nan, math.nan, (f"id{suffix}",)),
            Spike(spike + 1, 37.0, 61.0, (17, f"id{suffix}"), 1, tensors[2], 0.93),
        ),
        "culprits": (Culprit(nonfinite + 1, tensors[3], 2, 1, (0, 1)),),
        "summary": {"held_out": 2.02, "guess": 4.64, "r2": None},
    }
    return make_log(norms, **{**fields, **columns})


def _replace_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
