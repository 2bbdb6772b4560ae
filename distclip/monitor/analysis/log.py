"""`Log`: the lines of one run, by column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Culprit", "Log", "Numbers", "Spike"]

Numbers: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spike:
    """A step whose norm stood out, with what the recorder kept of it.

    Args:
        step: which.
        norm: before clipping; NaN where it was not finite.
        ratio: how many times the running median before it; NaN where there was none yet or the norm is not finite.
        ids: of the samples of its batch, on all ranks; empty where none were given.
        rank: on which the largest part of the norm lay; None where all ranks have the same.
        tensor: whose gradient was the largest there; None where unknown.
        share: which part of the whole squared norm that tensor's piece was, 0 to 1; NaN where unknown.
    """

    step: int
    norm: float
    ratio: float
    ids: tuple[int | str, ...] = ()
    rank: int | None = None
    tensor: str | None = None
    share: float = float("nan")


@dataclass(frozen=True, slots=True)
class Culprit:
    """A gradient that was not finite at a step: how many NaN and infinite elements, on which ranks."""

    step: int
    name: str
    nans: int
    infs: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Log:
    """One run.

    Args:
        name: to tell it from others on a page.
        path: of its lines.
        header: what the recorder said of the run: policy, per, slots, tensors, batch, precision …; empty for lines that
            were written by hand.
        steps: (n,) int64, increasing.
        norms: (n,) before clipping; NaN where not finite.
        bounds: (n,) what the policy allowed; NaN where it has no single bound or none yet.
        coefs: (n,) by what the whole gradient was shortened, 1 where it was not.
        clipped, finite, skipped: (n,) bool.
        columns: whatever else lines have as numbers, by name ("loss", "lr", "scale", "update_ratio" …): (n,) each, NaN
            where a line lacks it or it is not finite.
        tensors: names of what has a norm of its own in `tensor_norms`; empty where none was recorded.
        tensor_steps: (m,) int64 and
        tensor_norms: (m, tensors) of these steps; in a long run every so-manieth only.
        spikes: in order of steps.
        culprits: in order of steps.
        torn: lines that could not be read.
        summary: what the run left as summary.json, if anything.
        figures: paths of figures/*.json beside the lines: plotly figures that the run drew itself.
    """

    name: str
    path: Path
    header: Mapping[str, Any]
    steps: NDArray[np.int64]
    norms: Numbers
    bounds: Numbers
    coefs: Numbers
    clipped: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    skipped: NDArray[np.bool_]
    columns: Mapping[str, Numbers] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    tensor_steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    tensor_norms: Numbers = field(default_factory=lambda: np.zeros((0, 0)))
    spikes: tuple[Spike, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    torn: int = 0
    summary: Mapping[str, Any] | None = None
    figures: tuple[Path, ...] = ()
