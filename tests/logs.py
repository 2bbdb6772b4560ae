"""Logs of runs as they would be read, made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from distclip.monitor.analysis.log import Culprit, Log, Spike

__all__ = ["bare", "full"]


def bare(norms: list[float], **more: Any) -> Log:
    """Of norms and nothing else."""
    values = np.array(norms, np.float64)
    finite = np.isfinite(values)
    size = len(values)
    columns: dict[str, Any] = {
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
    return Log(**{**columns, **more})


def full(size: int = 400, name: str = "run", bound: float = 1.0, seed: int = 0, extra: str = "", **more: Any) -> Log:
    """With everything that a run can leave: spikes, a skipped step, one that is not finite, tensors, columns.

    Args:
        extra: is put behind each of its strings.
    """
    random = np.random.default_rng(seed)
    norms = np.exp(random.normal(-0.5, 0.3, size))
    spiky, lost = size // 2, size // 3
    norms[spiky], norms[lost] = 37.0, np.nan
    finite = np.isfinite(norms)
    coefs = np.where(finite, np.minimum(1.0, bound / norms), 1.0)
    skipped = ~finite
    skipped[spiky] = True
    tensors = tuple(f"layers.{i}.weight{extra}" for i in range(6))
    columns = {
        "loss": 2 + np.exp(-np.arange(size) / 50),
        "lr": np.full(size, 0.1),
        f"tokens{extra}": np.arange(size) * 1e3,
    }
    values: dict[str, Any] = {
        "name": name + extra,
        "header": {"policy": f"NormPolicy(…){extra}", "batch": 20, f"site{extra}": "here"},
        "bounds": np.full(size, bound),
        "coefs": coefs,
        "clipped": coefs < 1,
        "skipped": skipped,
        "columns": columns,
        "tensors": tensors,
        "tensor_steps": np.arange(1, size + 1, 4),
        "tensor_norms": np.exp(random.normal(0, 1, (len(range(0, size, 4)), len(tensors)))),
        "spikes": (
            Spike(lost + 1, math.nan, math.nan, (f"id{extra}",)),
            Spike(spiky + 1, 37.0, 61.0, (17, f"id{extra}"), 1, tensors[2], 0.93),
        ),
        "culprits": (Culprit(lost + 1, tensors[3], 2, 1, (0, 1)),),
        "summary": {"held_out": 2.02, "guess": 4.64, "r2": None},
    }
    return bare(norms.tolist(), **{**values, **more})
