"""Measure the cost of a columnar log: `python -m distclip.monitor.columnar.cost --steps 1000000`.

A recorder writes the norms of a simulated run, in which single tensors spike in single steps. The table has the size of
the log, the time of a write, the number of spikes that each level of the pyramid shows, and the time and size of a
report.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...clipper import GradClipper
from ...policies import global_norm
from ..recorder import Recorder
from ..step_buffer import Step
from .files import WINDOW, read_cells, read_level
from .store import Store

__all__ = ["main"]

EVERY = 50
"""Number of steps between two writes."""

SPIKE = 50.0
"""Factor by which a spike exceeds the norm of its tensor."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a log and print the table.

    Args:
        arguments: arguments of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m distclip.monitor.columnar.cost", description=__doc__)
    for name, default, text in (
        ("tensors", 5000, "number of tensors"),
        ("steps", 100_000, "number of steps"),
        ("spikes", 1000, "number of tensors that stand out in one step"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default:,})")
    parser.add_argument("--directory", type=Path, help="directory of the log, which remains (default: a temporary one)")
    args = parser.parse_args(arguments)
    print(f"{args.tensors:,} tensors, {args.steps:,} steps, {args.spikes:,} spikes", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        spikes = _choose_spikes(args.tensors, args.steps, args.spikes)
        _write(directory, args.tensors, args.steps, spikes)
        _print_size(directory, args.tensors, args.steps)
        _print_visible(directory, spikes)
        _print_report(directory)
    return 0


Spikes = set[tuple[int, int]]
"""Pairs of a step and a tensor."""


def _choose_spikes(num_tensors: int, num_steps: int, count: int) -> Spikes:
    generator = np.random.default_rng(1)
    spikes: Spikes = set()
    while len(spikes) < min(count, num_steps * num_tensors):
        spikes.add((int(generator.integers(1, num_steps + 1)), int(generator.integers(num_tensors))))
    return spikes


def _simulate(num_tensors: int, num_steps: int, spikes: Spikes) -> Iterator[tuple[NDArray[np.float32], float]]:
    """Yield the norms of the tensors and the loss of each step."""
    generator = np.random.default_rng(0)
    # Products of a few rows and a factor per step differ in all digits, as real norms do.
    noise = np.exp(generator.normal(0, 0.3, (64, num_tensors))) * np.exp(generator.normal(-3, 2, num_tensors))
    tensors_of: dict[int, list[int]] = {}
    for step, tensor in spikes:
        tensors_of.setdefault(step, []).append(tensor)
    for step in range(1, num_steps + 1):
        norms = (noise[generator.integers(64)] * np.exp(generator.normal(0, 0.1))).astype(np.float32)
        norms[tensors_of.get(step, [])] *= SPIKE
        yield norms, float(np.exp(-step / num_steps) + generator.normal(0, 0.05))


def _write(directory: Path, num_tensors: int, num_steps: int, spikes: Spikes) -> None:
    """Record the run, and print the time of a step and of the longest write."""
    names = [f"model.layers.{i // 9}.block.{i % 9}.weight" for i in range(num_tensors)]
    parameters = [(name, torch.nn.Parameter(torch.zeros(1))) for name in names]
    recorder = Recorder(
        GradClipper(parameters, global_norm(1.0)), directory, every=EVERY, per_tensor=True, log="columnar"
    )
    pending: list[Step] = []
    seconds: list[float] = []
    cpu = 0.0
    for number, (norms, loss) in enumerate(_simulate(num_tensors, num_steps, spikes), 1):
        norm = float(np.sqrt(np.square(norms, dtype=np.float64).sum()))
        fields: dict[str, Any] = {"norm": norm, "bound": 1.0, "coef": min(1.0, 1 / norm)}
        fields |= {"clipped": norm > 1, "finite": True, "skipped": False}
        numbers = {key: torch.tensor(value) for key, value in fields.items()}
        numbers["tensor_norms"] = torch.from_numpy(norms)
        pending.append(Step(number, numbers, torch.tensor(norm**2), (), {"loss": loss, "lr": 3e-4}))
        if len(pending) == EVERY or number == num_steps:
            start, start_cpu = time.perf_counter(), time.process_time()
            recorder.write_steps(pending)
            seconds.append(time.perf_counter() - start)
            cpu += time.process_time() - start_cpu
            pending = []
    recorder.close()
    print(f"write: {1e3 * sum(seconds) / num_steps:.3f} ms per step on average, {1e3 * cpu / num_steps:.3f} ms of CPU")
    print(f"       {1e3 * statistics.median(seconds) / EVERY:.3f} ms per step in the median write of {EVERY} steps")
    print(f"       {max(seconds):.2f} s in the longest write, which merges parts", flush=True)


def _print_size(directory: Path, num_tensors: int, num_steps: int) -> None:
    sizes: dict[str, int] = {}
    for path in directory.rglob("*"):
        if path.is_file():
            sizes[path.name] = sizes.get(path.name, 0) + path.stat().st_size
    total = sum(sizes.values())
    print(f"size: {total / 1e6:.0f} MB, {total / num_steps / num_tensors:.3f} bytes per tensor and step")
    print("      " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(sizes.items())))
    # The last steps have a limited size. Outliers and names grow less than the number of steps.
    fixed = sum(sizes.get(name, 0) for name in (WINDOW, "metrics.jsonl"))
    print(f"      at most {(fixed + (total - fixed) * 1e6 / num_steps) / 1e6:.0f} MB after 1,000,000 steps", flush=True)


def _print_visible(directory: Path, spikes: Spikes) -> None:
    """Print the number of spikes that each level shows as the peak of a row that contains the step."""
    parts = Store(directory / "metrics.columns").parts()
    last = parts[-1].info.last if parts else 0
    stored = {(step, tensor) for step, tensor in spikes if step <= last}
    num_levels = max((part.info.num_levels for part in parts), default=0)
    for number in range(num_levels):
        visible, rows = 0, 0
        for part in parts:
            level = read_level(part.path, part.info, number)
            rows += len(level)
            typical = np.median(level.end, axis=0)
            for step, tensor in stored:
                if part.info.first <= step <= part.info.last:
                    row = int(np.searchsorted(level.last, step))
                    visible += bool(level.high[row, tensor] > SPIKE / 6 * typical[tensor])
        print(f"level {number}: {visible:,} of {len(stored):,} spikes visible in {rows:,} rows")
    exact = 0
    for part in parts:
        cells = read_cells(part.path)
        exact += len(stored & set(zip(cells.steps.tolist(), cells.tensors.tolist(), strict=True)))
    print(f"exact: {exact:,} of {len(stored):,} spikes stored with their step", flush=True)


def _print_report(directory: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "distclip.monitor",
        "report",
        str(directory),
        "--out",
        str(directory / "page.html"),
    ]
    seconds, cpu = [], []
    for _ in range(3):
        start, start_cpu = time.perf_counter(), _child_cpu()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
        cpu.append(_child_cpu() - start_cpu)
    size = (directory / "page.html").stat().st_size
    print(f"report: {min(seconds):.2f} s (best of 3), {min(cpu):.2f} s of CPU, {size / 1e6:.2f} MB")


def _child_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    sys.exit(main())
