"""Runs made by hand, with known answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distclip.monitor.analysis.log import Log, read

HEADER: Mapping[str, Any] = {"distclip": "0.0", "format": 1, "slots": ["model"], "batch": 16, "precision": "fp32"}

Floats = NDArray[np.float64]


def usual(steps: int, seed: int = 0, scatter: float = 0.25) -> Floats:
    """Norms of a run in which nothing happens."""
    return np.exp(np.random.default_rng(seed).normal(0, scatter, steps))


def row(step: int, norm: float, bound: float = 10.0, **more: Any) -> dict[str, Any]:
    """A step's line, as a recorder writes it for a fixed bound."""
    finite = math.isfinite(norm)
    coef = min(1.0, bound / norm) if finite else 1.0
    line = {"step": step, "norm": norm, "bound": bound, "coef": coef, "clipped": coef < 1, "finite": finite}
    return {**line, "skipped": not finite, "loss": 2.0, "lr": 0.1, **more}


def rows(norms: ArrayLike, more: Callable[[int], Mapping[str, Any]] = lambda step: {}, **every: Any) -> list[Any]:
    """Lines from step 1 on.

    Args:
        more: further fields of a step.
        every: further fields of every step; `bound` too.
    """
    values = enumerate(np.asarray(norms, float).tolist(), 1)
    return [row(step, norm, **{**every, **more(step)}) for step, norm in values]


def written(directory: Path, *parts: Mapping[str, Any] | Sequence[Any]) -> Path:
    """A run directory with headers and lists of lines, one after another."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [line for part in parts for line in ([part] if isinstance(part, Mapping) else part)]
    text = "".join(json.dumps(_without_nan(line), allow_nan=False) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def log_of(norms: ArrayLike, **columns: Any) -> Log:
    """A log in memory, of norms alone or with more of its columns."""
    values = np.asarray(norms, float)
    count = len(values)
    given = {
        "header": {},
        "steps": np.arange(1, count + 1),
        "bounds": np.full(count, np.nan),
        "coefs": np.ones(count),
        "clipped": np.zeros(count, bool),
        "finite": np.isfinite(values),
        "skipped": np.zeros(count, bool),
        **columns,
    }
    return Log(name="run", path=Path("run/metrics.jsonl"), norms=values, **given)


def recorded(directory: Path, *parts: Mapping[str, Any] | Sequence[Any]) -> Log:
    """The log of what is written."""
    return read(written(directory, *parts))


def bad_record(epochs: int = 60, samples: int = 360, batch: int = 16, bad: int = 137) -> list[Any]:
    """A run over shuffled samples one of which is corrupted; the recorder keeps some ordinary steps as well."""
    generator = np.random.default_rng(0)
    lines: list[Any] = []
    for _ in range(epochs):
        order = generator.permutation(samples)
        for ids in order[: samples // batch * batch].reshape(-1, batch).tolist():
            norm, more = float(np.exp(generator.normal(0, 0.25))), {}
            if bad in ids:
                rank = ids.index(bad) * 2 // batch
                norm *= 30
                more = {"spike": norm, "ids": ids, "worst": {"rank": rank, "tensor": "2.weight", "share": 0.9}}
            elif len(lines) in (0, 1, 5, 40):
                more = {"spike": 1.5, "ids": ids}
            lines.append(row(len(lines) + 1, norm, **more))
    return lines


def _without_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
