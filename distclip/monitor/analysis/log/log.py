"""Hold the lines of one run as columns (`Log`), and read them from a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError, UnreadableLinesWarning
from ..spikes import Culprit, Difference, Spike
from ..statistics import Numbers
from .columns import TensorTable
from .foreign import EVENTS, Keys, convert, find_file, is_foreign, read_rows
from .reader import LineReader, LogParser, Session
from .runs import LINES, find_runs, find_store, name_runs
from .trackio import split_run

__all__ = ["Log", "once_per_log", "read", "read_all"]

T = TypeVar("T")

_ANY = Keys()

MAX_REPLAYS = 100
"""Maximum number of replays that are read."""


@dataclass(frozen=True)
class Log:
    """One run.

    Args:
        name: name that distinguishes the run from others on a page.
        path: path of the file of lines.
        header: facts that the recorder wrote about the run (policy, per, slots, tensors, batch, precision …), from the
            last header if the run was resumed; empty for lines that were written by hand.
        steps: (n,) int64, increasing.
        norms: (n,) norms before clipping; NaN where not finite.
        bounds: (n,) norms that the policy allowed; NaN where it has no single bound.
        coefs: (n,) factors by which clipping changed the norm of the whole gradient; 1 where it did not.
        clipped: (n,) bool.
        finite: (n,) bool.
        skipped: (n,) bool.
        columns: other numbers of the lines by name ("loss", "lr", "scale", "update_ratio" …), (n,) each; NaN where a
            line lacks the number or it is not finite.
        tensors: names of the columns of `tensor_norms`; empty if the run recorded none.
        tensor_steps: (m,) int64, first step of each row of `tensor_norms`. Long runs have fewer rows than steps.
        tensor_norms: (m, tensors) norms at one of the steps between the first step of a row and that of the next row.
        tensor_peaks: (m, tensors) largest norms of all these steps; `tensor_norms` if it is empty.
        spikes: spikes in order of steps; the most extreme ones if there are very many.
        culprits: culprits in order of steps; the first ones if there are very many.
        differences: replicas that differed, in order of steps; the first ones if there are very many.
        unreadable: number of lines that were ignored.
        summary: content of the run's summary.json; None without one.
        figures: paths of figures/*.json in the run's directory: plotly figures that the run drew itself.
        sessions: sessions in order, one per header.
        is_launched: whether launch/train.py made the run, so that its overrides apply.
        checkpoints: steps of the checkpoints in the run's directory, increasing.
        unknown: sentences about facts that the log of another tool does not contain; empty for a recorder's log.
        replays: contents of spikes/STEP.json, which `Recorder(examine=...)` wrote, in order of steps.
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
    tensor_peaks: Numbers = field(default_factory=lambda: np.zeros((0, 0)))
    spikes: tuple[Spike, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    differences: tuple[Difference, ...] = ()
    unreadable: int = 0
    summary: Mapping[str, Any] | None = None
    figures: tuple[Path, ...] = ()
    sessions: tuple[Session, ...] = ()
    is_launched: bool = False
    checkpoints: tuple[int, ...] = ()
    unknown: tuple[str, ...] = ()
    replays: tuple[Mapping[str, Any], ...] = ()
    _results: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Use the norms as peaks if there are no peaks."""
        if not self.tensor_peaks.size:
            object.__setattr__(self, "tensor_peaks", self.tensor_norms)

    @property
    def clip_rate(self) -> float:
        """Share of the clipped steps, 0 to 1. NaN if the log does not show which steps were clipped."""
        return float(self.clipped.mean()) if len(self.steps) and not self.unknown else float("nan")


def once_per_log(compute: Callable[[Log], T]) -> Callable[[Log], T]:
    """Return a function that computes its result once for each log, and keeps it as long as the log."""

    @wraps(compute)
    def look_up(log: Log) -> T:
        if compute not in log._results:
            log._results[compute] = compute(log)
        result: T = log._results[compute]
        return result

    return look_up


def read(path: Path, name: str | None = None, keys: Keys = _ANY) -> Log:
    """Read the lines of a run, or a log of another tool. Unreadable lines are ignored with a warning.

    Args:
        path: path of the run's directory, or of the file.
        name: name that distinguishes the run from others; None for the name of the directory.
        keys: names of the columns in a log of another tool.

    Raises:
        RunError: the file has no norms.
    """
    file = path
    if path.is_dir():
        file = path / LINES if (path / LINES).is_file() else find_file(path) or path / LINES
    reader, parser = LineReader(file), LogParser()
    unknown: tuple[str, ...] = ()
    table: TensorTable | None = None
    if keys == _ANY and (store := find_store(file)) is not None:
        # Only these logs need pyarrow.
        from .parts import read_parts

        reader, parser, table = read_parts(file, store)
    elif keys != _ANY or is_foreign(file):
        unknown = _read_foreign(file, keys, parser)
        if file.is_dir():
            file = min(file.glob(EVENTS))
        elif (run := split_run(file)) is not None:
            file, _ = run
    else:
        for block in reader:
            parser.add(block)
        if not parser.columns.steps and not parser.invalid and parser.other_keys:
            with suppress(RunError):
                # These are JSON lines of another tool, if they have columns with the usual names.
                unknown = _read_foreign(file, keys, parser)
        parser.check(reader)
    if reader.unreadable:
        first = reader.unreadable[0]
        many = f"{len(reader.unreadable)} lines cannot be read and were ignored, the first is line {first}"
        one = f"line {first} cannot be read and was ignored"
        text = one if len(reader.unreadable) == 1 else many
        warnings.warn(f"{file}: {text}", UnreadableLinesWarning, stacklevel=2)
    columns = {key: parser.columns.number(key) for key in parser.columns.numbers}
    tensors, tensor_steps, tensor_norms, tensor_peaks = parser.tensors.table() if table is None else table
    return Log(
        name=name if name is not None else name_runs([path])[0],
        path=file,
        header=parser.sessions[-1].header if parser.sessions else {},
        steps=np.frombuffer(parser.columns.steps, np.int64),
        norms=columns.pop("norm"),
        bounds=columns.pop("bound"),
        coefs=columns.pop("coef"),
        clipped=parser.columns.flag("clipped"),
        finite=parser.columns.flag("finite"),
        skipped=parser.columns.flag("skipped"),
        columns=columns,
        tensors=tensors,
        tensor_steps=tensor_steps,
        tensor_norms=tensor_norms,
        tensor_peaks=tensor_peaks,
        spikes=tuple(parser.spikes),
        culprits=tuple(parser.culprits),
        differences=tuple(parser.differences),
        unreadable=len(reader.unreadable) + parser.invalid,
        summary=_read_summary(file.parent),
        figures=tuple(sorted(file.parent.glob("figures/*.json"))),
        sessions=tuple(parser.sessions),
        is_launched=_is_launched(file.parent),
        checkpoints=_find_checkpoints(file.parent),
        unknown=unknown,
        replays=_read_replays(file.parent),
    )


def _read_foreign(file: Path, keys: Keys, parser: LogParser) -> tuple[str, ...]:
    """Parse a log of another tool, and return sentences about missing facts."""
    lines, unknown = convert(read_rows(file), keys, file)
    if not lines:
        raise RunError(f"{file} has no step with a number in the column of the norm")
    parser.add(lines)
    return unknown


def read_all(paths: str | Path | Sequence[str | Path], keys: Keys = _ANY) -> list[Log]:
    """Read all runs at these paths, with names that distinguish them.

    Args:
        paths: see `find_runs`.
        keys: names of the columns in logs of other tools.

    Raises:
        RunError: there is no run at one of the paths, or a run has no norms.
    """
    runs = find_runs(paths)
    return [read(run, name, keys) for run, name in zip(runs, name_runs(runs), strict=True)]


def _is_launched(directory: Path) -> bool:
    try:
        # Other programs have a config.yaml too, but not with these groups.
        text = (directory / "config.yaml").read_text()
    except (OSError, ValueError):
        return False
    return all(f"\n{key}:" in f"\n{text}" for key in ("clip", "parallel", "checkpoint", "replay"))


def _find_checkpoints(directory: Path) -> tuple[int, ...]:
    steps = [path.name.removeprefix("step_") for path in directory.glob("checkpoints/step_*")]
    return tuple(sorted(int(step) for step in steps if step.isdecimal()))


def _read_replays(directory: Path) -> tuple[Mapping[str, Any], ...]:
    replays = []
    for path in sorted(directory.glob("spikes/*.json"))[:MAX_REPLAYS]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            replays.append(content)
    return tuple(sorted(replays, key=lambda content: content["step"]))


def _read_summary(directory: Path) -> Mapping[str, Any] | None:
    try:
        summary = json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None
