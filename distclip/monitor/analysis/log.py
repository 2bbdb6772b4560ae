"""`Log`: the lines of one run, by column; `find_runs` and `read`, which make it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import TornWarning
from .reading import Reader
from .runs import LINES, find_runs, names_of
from .spikes import Culprit, Spike
from .steps import Session, Steps

__all__ = ["Culprit", "Log", "Numbers", "Session", "Spike", "find_runs", "read", "read_all"]

Numbers: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Log:
    """One run.

    Args:
        name: to tell it from others on a page.
        path: of its lines.
        header: what the recorder said of the run: policy, per, slots, tensors, batch, precision …; the last one where
            the run was resumed, empty for lines that were written by hand.
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
        spikes: in order of steps; of very many the most extreme.
        culprits: in order of steps; of very many the first.
        torn: lines that could not be read.
        summary: what the run left as summary.json, if anything.
        figures: paths of figures/*.json beside the lines: plotly figures that the run drew itself.
        sessions: in order: one for each header, with the step from which it holds.
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
    sessions: tuple[Session, ...] = ()


def read(path: Path, name: str | None = None) -> Log:
    """A run's lines. Lines that cannot be read are left out, with a warning.

    Args:
        path: of the run's directory, or of the lines themselves.
        name: to tell it from others; None for the directory's.

    Raises:
        RunError: there are no norms to be read.
    """
    file = path / LINES if path.is_dir() else path
    lines, steps = Reader(file), Steps()
    for block in lines:
        steps.add(block)
    steps.check(lines)
    torn = len(lines.torn) + steps.strange
    if lines.torn:
        line = f"line {lines.torn[0]}" if len(lines.torn) == 1 else f"{len(lines.torn)} lines, first {lines.torn[0]},"
        warnings.warn(f"{file}: {line} cannot be read and was left out", TornWarning, stacklevel=2)
    columns = {key: steps.columns.number(key) for key in steps.columns.numbers}
    tensors, tensor_norms = steps.tensors.table()
    return Log(
        name=name if name is not None else names_of([path])[0],
        path=file,
        header=steps.sessions[-1].header if steps.sessions else {},
        steps=np.frombuffer(steps.columns.steps, np.int64),
        norms=columns.pop("norm"),
        bounds=columns.pop("bound"),
        coefs=columns.pop("coef"),
        clipped=steps.columns.flag("clipped"),
        finite=steps.columns.flag("finite"),
        skipped=steps.columns.flag("skipped"),
        columns=columns,
        tensors=tensors,
        tensor_steps=np.array(steps.tensors.steps, np.int64),
        tensor_norms=tensor_norms,
        spikes=tuple(steps.spikes),
        culprits=tuple(steps.culprits),
        torn=torn,
        summary=_summary(file.parent),
        figures=tuple(sorted(file.parent.glob("figures/*.json"))),
        sessions=tuple(steps.sessions),
    )


def read_all(paths: Sequence[Path]) -> list[Log]:
    """All runs that are meant, with names that tell them apart.

    Raises:
        RunError: one of them is none, or has no norms.
    """
    runs = find_runs(paths)
    return [read(run, name) for run, name in zip(runs, names_of(runs), strict=True)]


def _summary(directory: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
