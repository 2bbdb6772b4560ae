"""Read logs of other tools: TensorBoard, W&B, transformers, Lightning, Trackio, and any table of numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import printable
from ..errors import RunError
from ..formatting import format_list
from .columns import Line
from .reader import LineReader
from .trackio import read_run, split_run
from .wandb import SUFFIX as WANDB
from .wandb import read_history

__all__ = ["EVENTS", "FILES", "Keys", "convert", "find_file", "is_foreign", "read_rows"]

EVENTS = "*tfevents*"
"""Pattern of the names of TensorBoard's files."""

FILES = ("trainer_state.json", "metrics.csv", EVENTS)
"""Patterns of the files of other tools that make a directory a run."""

STEPS = ("clip/step", "step", "_step", "global_step", "trainer/global_step", "iteration", "iter")
"""Names of the step, most specific first, in lower case. distclip's sink for W&B uses the first one."""

NORMS: tuple[str, ...] = (
    "norm",
    "grad_norm",
    "gradient_norm",
    "total_grad_norm",
    "global_grad_norm",
    "total_norm",
    "global_norm",
)
NORMS += ("global_norm", "gnorm", "grad_2.0_norm_total", "grad_norm_total", "grad-norm", "gradnorm")
"""Last parts of names of the norm, most specific first."""

LOSSES = ("loss", "train_loss", "training_loss", "loss_step", "train_loss_step")
"""Last parts of names of the training loss, most specific first."""

RATES = ("lr", "learning_rate")
"""Last parts of names of the learning rate."""

HELD_OUT = ("eval", "val", "valid", "test", "dev")
"""Words that mark the name of a column as not from training."""

MAX_PLATEAU = 0.2
"""Share of norms at their maximum above which they count as norms after clipping."""

RESERVED = {"bound", "coef", "clipped", "finite", "skipped", "norms", "tensor_norms", "culprits", "replicas"}
RESERVED |= {"spike", "ids", "worst", "step", "norm", "loss", "lr", "distclip"}
"""Names with a meaning in lines of a recorder."""

Rows = list[Line]


@dataclass(frozen=True)
class Keys:
    """Names of the columns of a foreign log.

    Args:
        norm: column of the gradient norm; None to find it by its usual names.
        loss: column of the training loss; None to find it by its usual names.
    """

    norm: str | None = None
    loss: str | None = None


def find_file(directory: Path) -> Path | None:
    """Return the file of another tool that makes a directory a run, or None.

    Among checkpoints of transformers, the last one has the whole log.
    """
    for pattern in FILES:
        if found := sorted(path for path in directory.glob(pattern) if path.is_file()):
            return directory if pattern == EVENTS else found[0]
    states = list(directory.glob("checkpoint-*/trainer_state.json"))
    return max(states, key=lambda path: (len(path.parent.name), path.parent.name), default=None)


def is_foreign(path: Path) -> bool:
    """Return whether a path is that of a log in another tool's format, rather than of JSON lines."""
    return path.is_dir() or path.suffix in (".csv", ".json", WANDB) or path.match(EVENTS) or split_run(path) is not None


def read_rows(path: Path) -> Rows:
    """Read the rows of a log as dictionaries.

    Args:
        path: path of a CSV file, a file of JSON or JSON lines, an event file of TensorBoard, a directory of event
            files, a file of W&B, or a run in a Trackio database.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        if (run := split_run(path)) is not None:
            return read_run(*run)
        if path.is_dir() or path.match(EVENTS):
            return _read_events(path)
        if path.suffix == WANDB:
            return read_history(path)
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".json":
            return list(map(_flatten, _read_json(path)))
        return [_flatten(line) for block in LineReader(path) for line in block]
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def convert(rows: Rows, keys: Keys, path: Path) -> tuple[list[Line], tuple[str, ...]]:
    """Convert rows of another tool to lines as a recorder writes them.

    Args:
        rows: rows of the log. A step may have several.
        keys: names of its columns.
        path: path of the log, for errors.

    Returns:
        Lines in the order of their steps, and a sentence about each fact that the log does not contain.

    Raises:
        RunError: the log has no column for the step or the norm, or has several.
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    step_key = next((name for wanted in STEPS for name in names if name.lower() == wanted), None)
    if step_key is None:
        raise RunError(f'{path} has no column for the step, such as "step". It has {_list(names)}')
    norm_key = _find_norm(names, keys.norm, path)
    loss_key = _find_loss(names, keys.loss, path)
    rate_key = next((name for wanted in RATES for name in names if _last(name) == wanted), None)
    wanted = {name: f"{name}_" if name in RESERVED else name for name in names if not _is_range(name)}
    wanted |= {key: name for key, name in ((rate_key, "lr"), (loss_key, "loss"), (norm_key, "norm")) if key is not None}
    del wanted[step_key]
    by_step: dict[int, Line] = {}
    for row in rows:
        step = _number(row.get(step_key))
        if step is None or not step.is_integer():
            continue
        line = by_step.setdefault(int(step), {"step": int(step)})
        for key, name in wanted.items():
            value = _number(row.get(key))
            # Tables have NaN where another row of the same step has the number.
            if value is not None and (value == value or name not in line):
                line[name] = value
    lines, loss = [], None
    for line in sorted(by_step.values(), key=lambda line: line["step"]):
        # Losses may be logged between the steps with a norm.
        loss = line.get("loss", loss)
        if "norm" in line:
            if loss is not None:
                line.setdefault("loss", loss)
            lines.append(line)
            loss = None
    return lines, tuple(_find_unknown(lines, loss_key))


def _find_norm(names: Sequence[str], wanted: str | None, path: Path) -> str:
    if wanted is not None:
        return _find_wanted(names, wanted, "norm", path)
    candidates = [name for name in names if not _is_range(name)]
    for known in NORMS:
        if found := [name for name in candidates if _last(name) == known]:
            return _choose(found, "norm", path)
    found = [name for name in candidates if "grad" in name.lower() and "norm" in name.lower()]
    if not found:
        raise RunError(f"{path} has no gradient norm, only {_list(names)}. Pass the name of its column as --norm KEY")
    return _choose(found, "norm", path)


def _find_loss(names: Sequence[str], wanted: str | None, path: Path) -> str | None:
    if wanted is not None:
        return _find_wanted(names, wanted, "loss", path)
    candidates = [name for name in names if not _is_range(name) and not _is_held_out(name)]
    for known in LOSSES:
        if found := [name for name in candidates if _last(name) == known]:
            return _choose(found, "loss", path)
    return None


def _find_wanted(names: Sequence[str], wanted: str, kind: str, path: Path) -> str:
    """Return the name as it is in the log. Parts of a nested name may be joined by dots."""
    for name in (wanted, wanted.replace(".", "/")):
        if name in names:
            return name
    raise RunError(f"--{kind} {wanted}: {path} has no such column. It has {_list(names)}")


def _choose(found: Sequence[str], kind: str, path: Path) -> str:
    """Return the only candidate, or the only one for training."""
    if len(found) > 1:
        found = [name for name in found if name.lower().startswith("train")] or found
    if len(found) > 1:
        raise RunError(f"{path} has several columns for the {kind}: {_list(found)}. Pass one of them as --{kind} KEY")
    return found[0]


def _find_unknown(lines: Sequence[Line], loss_key: str | None) -> Iterator[str]:
    yield (
        "This log of another tool has no bound, and does not tell which steps were clipped or skipped. It has no "
        "samples, ranks or tensors behind spikes either. distclip.monitor.Recorder records them."
    )
    if loss_key is None:
        yield "It has no training loss, so that the outcome is unknown. Pass the name of its column as --loss KEY."
    steps = np.array([line["step"] for line in lines])
    if len(steps) > 1 and (every := int(np.median(np.diff(steps)))) > 1:
        yield f"It has a norm for one of {every} steps. Spikes between them are missing, and streaks cannot be counted."
    norms = np.array([line["norm"] for line in lines], dtype=np.float64)
    norms = norms[np.isfinite(norms)]
    if len(norms) > 10 and np.mean(norms >= norms.max() * (1 - 1e-3)) > MAX_PLATEAU and np.ptp(norms) > 0:
        yield (
            f"Many norms are equal to the largest, {norms.max():.3g}, so these are probably norms after clipping. "
            "Record them before clipping."
        )


def _read_csv(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows: Rows = [{key: value for key, value in row.items() if key is not None} for row in csv.DictReader(file)]
    return rows


def _read_json(path: Path) -> Rows:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = content.get("log_history", content.get("history"))
    if not isinstance(content, list):
        raise ValueError("it is neither a list of objects nor has one as log_history")
    return [row for row in content if isinstance(row, dict)]


def _read_events(path: Path) -> Rows:
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            EventAccumulator,
        )
        from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise RunError(f"{path}: tensorboard is not installed. Use pip install tensorboard") from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    rows: Rows = [
        {"step": event.step, tag: event.value} for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    ]
    for tag in events.Tags()["tensors"]:
        # TensorFlow writes scalars as tensors.
        values = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        rows += [
            {"step": step, tag: float(value)} for step, value in values if value.size == 1 and value.dtype.kind in "fiu"
        ]
    return rows


def _flatten(row: Line) -> Line:
    """Join the names of nested objects by slashes."""
    flat: Line = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": value for inner, value in _flatten(value).items()}
        else:
            flat[name] = value
    return flat


def _number(value: Any) -> float | None:
    """Return a number, or the text of a number, as a float, and None for anything else."""
    if isinstance(value, bool) or value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _last(name: str) -> str:
    """Return the last part of a name: "grad_norm" for W&B's "run - train/grad_norm"."""
    return name.lower().rpartition(" - ")[2].rpartition("/")[2].strip()


def _is_range(name: str) -> bool:
    """Return whether a W&B column has the extremes of another one."""
    return name.endswith(("__MIN", "__MAX"))


def _is_held_out(name: str) -> bool:
    parts = name.lower().rpartition(" - ")[2].replace("/", "_").replace("-", "_").split("_")
    return any(part in HELD_OUT or part.startswith("valid") for part in parts)


def _list(names: Iterable[str]) -> str:
    return format_list(map(printable, names), 12) or "nothing"
