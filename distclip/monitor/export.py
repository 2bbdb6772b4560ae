"""Write the numbers of a run in formats of other tools: Parquet, CSV, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .analysis.errors import RunError
from .analysis.log import Log

__all__ = ["FORMATS", "export"]

Table: TypeAlias = Mapping[str, NDArray[Any]]
"""Columns of equal length by name."""

BLOCK = 10_000
"""Number of rows that are converted to objects of Python at once."""


def export(log: Log, target: str, directory: Path) -> list[Path]:
    """Write the steps of a run, and the norms of its tensors.

    Args:
        log: run to export.
        target: key of `FORMATS`.
        directory: directory to write to. It is created if it does not exist.

    Returns:
        Paths that were written.

    Raises:
        RunError: a package is not installed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return FORMATS[target](log, directory)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in PACKAGES:
            raise
        raise RunError(f"--to {target}: {name} is not installed. Use pip install {PACKAGES[name]}") from None


PACKAGES = {"pyarrow": "'distclip[columnar]'", "tensorboard": "tensorboard", "wandb": "wandb"}
"""Arguments of pip that install the package of a format."""


def _steps(log: Log) -> dict[str, NDArray[Any]]:
    """Return the numbers of all steps."""
    table: dict[str, NDArray[Any]] = {"step": log.steps, "norm": log.norms}
    if not log.unknown:
        # A log of another tool does not have these columns.
        table = {**table, "bound": log.bounds, "coef": log.coefs, "clipped": log.clipped, "skipped": log.skipped}
    return {**table, "finite": log.finite, **log.columns}


def _spikes(log: Log) -> dict[str, NDArray[Any]]:
    """Return a recorder's details of outliers as columns of the table of steps. IDs are a JSON list."""
    if not log.spikes:
        return {}
    columns = {key: np.full(len(log.steps), None, object) for key in ("ids", "worst_rank", "worst_tensor")}
    ratios = np.full(len(log.steps), np.nan)
    for spike, row in zip(log.spikes, np.searchsorted(log.steps, [spike.step for spike in log.spikes]), strict=True):
        ratios[row] = spike.ratio
        columns["ids"][row] = json.dumps(list(spike.ids)) if spike.ids else None
        columns["worst_rank"][row], columns["worst_tensor"][row] = spike.rank, spike.tensor
    return {"spike": ratios, **columns}


def _tensor_rows(log: Log) -> Iterator[tuple[int, Mapping[str, tuple[float, float]]]]:
    """Yield the step of each row of tensor norms, and (norm, peak) by tensor."""
    for step, norms, peaks in zip(log.tensor_steps.tolist(), log.tensor_norms, log.tensor_peaks, strict=True):
        pairs = zip(log.tensors, norms.tolist(), peaks.tolist(), strict=True)
        yield step, {name: (norm, peak) for name, norm, peak in pairs if peak == peak}


def _write_parquet(log: Log, directory: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [directory / "steps.parquet"]
    columns = {key: pa.array(column, from_pandas=True) for key, column in {**_steps(log), **_spikes(log)}.items()}
    pq.write_table(pa.table(columns), paths[0], compression="zstd")
    if log.tensors:
        paths.append(directory / "tensors.parquet")
        rows, columns_per_row = log.tensor_norms.shape
        names = pa.DictionaryArray.from_arrays(np.tile(np.arange(columns_per_row, dtype=np.int32), rows), log.tensors)
        flat = {"norm": log.tensor_norms.ravel(), "peak": log.tensor_peaks.ravel()}
        norms = {key: pa.array(column, from_pandas=True) for key, column in flat.items()}
        table = pa.table({"step": log.tensor_steps.repeat(columns_per_row), "tensor": names, **norms})
        pq.write_table(table, paths[1], compression="zstd")
    return paths


def _write_csv(log: Log, directory: Path) -> list[Path]:
    paths = [directory / "steps.csv"]
    table = {**_steps(log), **_spikes(log)}
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for start in range(0, len(log.steps), BLOCK):
            columns = [column[start : start + BLOCK].tolist() for column in table.values()]
            writer.writerows(map(_format_row, zip(*columns, strict=True)))
    if log.tensors:
        paths.append(directory / "tensors.csv")
        with paths[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "tensor", "norm", "peak"))
            for step, row in _tensor_rows(log):
                writer.writerows(_format_row((step, name, *pair)) for name, pair in row.items())
    return paths


def _format_row(row: tuple[Any, ...]) -> list[Any]:
    """Leave out numbers that are not known, and write bools as 0 and 1."""
    return [
        int(value) if isinstance(value, bool) else "" if value is None or value != value else value for value in row
    ]


def _numbers(log: Log) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the known numbers of each step under the names that the sinks use, and the peaks of tensors."""
    table = _steps(log)
    names = [f"clip/{name}" for name in table if name != "step"]
    rows, end = _tensor_rows(log), (-1, dict[str, tuple[float, float]]())
    tensor_step, tensors = next(rows, end)
    for start in range(0, len(log.steps), BLOCK):
        columns = [column[start : start + BLOCK].tolist() for column in table.values()]
        for step, *values in zip(*columns, strict=True):
            numbers = {name: float(value) for name, value in zip(names, values, strict=True) if value == value}
            if step == tensor_step:
                numbers |= {f"clip/tensor_norms/{name}": peak for name, (_, peak) in tensors.items()}
                tensor_step, tensors = next(rows, end)
            yield step, numbers


def _write_events(log: Log, directory: Path) -> list[Path]:
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

    writer = EventFileWriter(str(directory))
    times = log.columns.get("time")
    for i, (step, numbers) in enumerate(_numbers(log)):
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        time = float(times[i]) if times is not None and times[i] == times[i] else 0.0
        writer.add_event(Event(wall_time=time, step=step, summary=Summary(value=values)))
    writer.close()
    return sorted(directory.glob("*tfevents*"))[-1:]


def _send_to_wandb(log: Log, directory: Path) -> list[Path]:
    import wandb

    config = {key: value for key, value in log.header.items() if key not in ("tensors", "slots")}
    run = wandb.init(name=log.name, dir=str(directory), config=config)
    run.define_metric("clip/step")
    run.define_metric("clip/*", step_metric="clip/step")
    for step, numbers in _numbers(log):
        run.log({**numbers, "clip/step": step})
    path = Path(run.dir)
    run.finish()
    return [path]


FORMATS: Mapping[str, Callable[[Log, Path], list[Path]]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "tensorboard": _write_events,
    "wandb": _send_to_wandb,
}
"""Functions that write a format, by the name of the format."""
