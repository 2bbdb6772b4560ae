"""Count how often a diagnosis names the right cause first: `python -m distclip.monitor.analysis.confusion`.

Half of the runs are trained: a small network on CPU whose optimizer steps through a `GradClipper` with a `Recorder`.
The other half are simulated: norms and losses with the statistics of long runs. Each run has one of eight kinds of
problems, or none, and random sizes of everything else.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from ..._console import Screen
from ...clipper import GradClipper
from ...policies import global_norm
from ..recorder import Recorder
from .diagnosis import diagnose
from .formatting import format_percent
from .log import read
from .suggest import suggest

__all__ = ["KINDS", "count", "count_stationary", "main", "make_run"]

KINDS: Mapping[str, str] = {
    "healthy": "",
    "learning rate too high": "divergence",
    "no warm-up": "warm-up",
    "bad sample": "bad data",
    "fp16": "numerics",
    "dominant tensor": "dominant tensor",
    "hardware fault": "hardware",
    "bound too low": "clip rate",
}
"""Rule that must come first for each kind of run."""

NAMES = ("embed.weight", "block.0.weight", "block.1.weight", "block.2.weight", "head.weight")
"""Tensors of a simulated run."""


def make_run(kind: str, seed: int, directory: Path) -> Path:
    """Make a run of a kind, trained for even seeds and simulated for odd ones.

    Args:
        kind: one of `KINDS`.
        seed: seed of the run.
        directory: directory for the files of the run.

    Returns:
        The path of the log.
    """
    return _train(kind, seed, directory) if seed % 2 == 0 else _simulate(kind, seed, directory)


def count(num_runs: int, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Counter[str]]:
    """Make and diagnose runs.

    Args:
        num_runs: number of runs of all kinds together.
        kinds: some keys of `KINDS`.

    Returns:
        {kind: {rule that came first, "" for none: number of runs}}.
    """
    table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(num_runs):
            kind = kinds[i % len(kinds)]
            findings = diagnose(read(make_run(kind, i // len(kinds), Path(folder) / str(i))))
            table[kind][findings[0].rule if findings else ""] += 1
    return table


def count_stationary(num_runs: int) -> Counter[str]:
    """Diagnose stationary runs that are clipped at the bound that `suggest` finds in another such run.

    Args:
        num_runs: number of runs, with a scatter of the logarithms from 0.1 to 0.9, and 400 or 1,500 steps.

    Returns:
        {rule that came first, "" for none: number of runs}.
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(num_runs):
            random = np.random.default_rng(seed)
            steps, scatter = (400, 1500)[seed % 2], random.uniform(0.1, 0.9)
            bound, losses = math.inf, np.full(steps, 2.0)
            for i in range(2):
                norms, directory = np.exp(random.normal(0, scatter, steps)), Path(folder) / f"{seed}-{i}"
                _write(directory, {"distclip": "0.1.0", "format": 1}, norms, losses, bound)
                log = read(directory)
                bound = suggest(log).max_norm
            findings = diagnose(log)
            found[findings[0].rule if findings else ""] += 1
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=320, metavar="N", help="number of runs (default: 320)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="of runs (default: all)"
    )
    parser.add_argument(
        "--stationary", type=int, metavar="N", help="clip N stationary runs at the bound that `suggest` finds instead"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.stationary:
        stationary = count_stationary(arguments.stationary)
        print(f"{arguments.stationary - stationary['']:,} of {arguments.stationary:,} stationary runs have a finding")
        return
    counts = count(arguments.runs, arguments.kinds)
    table = Table(title="runs by their kind and the finding that came first")
    table.add_column("kind")
    rules = list(KINDS.values())
    for rule in rules:
        table.add_column(rule or "no finding", justify="right")
    table.add_column("right", justify="right")
    for kind, found in counts.items():
        right = format_percent(found[KINDS[kind]] / max(1, found.total()))
        table.add_row(kind, *(str(found[rule] or "") for rule in rules), right)
    Screen().console.print(table)


def _simulate(kind: str, seed: int, directory: Path) -> Path:
    """Write the log of a run whose norms and losses are drawn at random."""
    random = np.random.default_rng([seed, list(KINDS).index(kind)])
    steps = int(random.integers(400, 3000))
    time = np.arange(steps)
    level, scatter = 10 ** random.uniform(-3, 2), random.uniform(0.1, 0.5)
    decay = 1 + random.uniform(0, 4) * np.exp(-time / (0.05 * steps))
    norms = level * decay * np.exp(random.normal(0, scatter, steps))
    start = random.uniform(2, 11)
    losses = start * (0.3 + 0.7 * np.exp(-time / (0.3 * steps))) * np.exp(random.normal(0, 0.03, steps))
    bound = float(level * random.choice([1.5, 3, 10, math.inf]))
    header: dict[str, Any] = {
        "distclip": "0.1.0", "format": 1, "slots": ["model"], "tensors": list(NAMES), "batch": 16, "world_size": 4,
        "precision": random.choice(["fp32", "bf16"]), "dataset_size": 800,
    }  # fmt: skip
    shares = random.dirichlet(np.full(len(NAMES), 20.0))
    extra: dict[int, dict[str, Any]] = {}
    scale = np.full(steps, np.nan)
    if kind == "learning rate too high":
        begin = int(steps * random.uniform(0.05, 0.6))
        rise = np.clip((time - begin) / (0.05 * steps), 0, 1)
        losses = losses * (1 - rise) + rise * start * random.uniform(1.3, 10) * np.exp(random.normal(0, 0.2, steps))
        norms *= (1 - rise) + rise * random.uniform(3, 50)
        if random.random() < 0.3:
            norms[begin + int(0.2 * steps) :] = math.nan
    elif kind == "no warm-up":
        early = random.choice(np.arange(2, max(12, int(0.06 * steps))), random.integers(4, 9), replace=False)
        norms = norms / decay
        norms[early] *= random.uniform(8, 60, len(early))
        bound = float(level * random.choice([20, math.inf]))
        losses[early] *= 1.1
    elif kind == "bad sample":
        for step in np.flatnonzero(random.random(steps) < random.uniform(0.01, 0.03)).tolist():
            norms[step] *= random.uniform(8, 40)
            losses[step] *= random.uniform(1.1, 2)
            ids = [137, *random.choice(800, 15, replace=False).tolist()]
            extra[step] = {"spike": 10.0, "ids": ids, "worst": _worst(random, 2)}
    elif kind == "fp16":
        header["precision"] = "fp16"
        falls = sorted(random.choice(np.arange(int(0.15 * steps), steps), random.integers(8, 30), replace=False))
        scale[:] = 65536.0
        for fall in falls:
            norms[fall] = math.nan
            scale[fall + 1 :] /= 2
            extra[fall] = {"culprits": [{"name": NAMES[int(random.integers(5))], "nans": 0, "infs": 3, "ranks": [1]}]}
    elif kind == "dominant tensor":
        shares = np.append(random.dirichlet(np.full(4, 20.0)) * 0.25, random.uniform(0.6, 0.95))
        shares /= shares.sum()
    elif kind == "hardware fault":
        for step in random.choice(np.arange(50, steps - 1, 7), random.integers(3, 7), replace=False).tolist():
            norms[step] *= 10 ** random.uniform(3, 15)
            extra[step] = {"spike": 1e3, "ids": random.choice(800, 16, replace=False).tolist()}
            extra[step]["worst"] = _worst(random, 3)
    elif kind == "bound too low":
        bound = level * random.uniform(0.1, 0.6)
    _write(directory, header, norms, losses, bound, shares, scale, extra)
    return directory


def _worst(random: np.random.Generator, rank: int) -> dict[str, Any]:
    return {"rank": rank, "tensor": NAMES[int(random.integers(len(NAMES)))], "share": 0.9}


def _write(
    directory: Path,
    header: Mapping[str, Any],
    norms: np.ndarray[Any, Any],
    losses: np.ndarray[Any, Any],
    bound: float,
    shares: np.ndarray[Any, Any] | None = None,
    scale: np.ndarray[Any, Any] | None = None,
    extra: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Write the lines of a recorder."""
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(header) + "\n")
        for i, norm in enumerate(norms.tolist()):
            finite = math.isfinite(norm)
            coef = min(1.0, bound / norm) if finite else None
            line: dict[str, Any] = {
                "step": i + 1, "norm": norm if finite else None, "bound": bound if math.isfinite(bound) else None,
                "coef": coef, "clipped": finite and norm > bound, "finite": finite, "skipped": not finite,
                "loss": float(losses[i]), **extra.get(i, {}),
            }  # fmt: skip
            if scale is not None and math.isfinite(scale[i]):
                line["scale"] = float(scale[i])
            if finite and shares is not None:
                line["tensor_norms"] = (norm * np.sqrt(shares)).tolist()
            file.write(json.dumps(line) + "\n")


class _Data:
    """Samples of a classification with a hidden linear rule.

    Args:
        generator: generator of the samples.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.inputs = torch.randn(256, 12, generator=generator)
        self.labels = (self.inputs @ torch.randn(12, 4, generator=generator)).argmax(1)
        self._generator = generator

    def batches(self, steps: int) -> Any:
        """Yield (ids, inputs, labels) of shuffled batches."""
        order = torch.zeros(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < 16:
                order = torch.randperm(256, generator=self._generator)
            ids, order = order[:16], order[16:]
            yield ids, self.inputs[ids], self.labels[ids]


def _train(kind: str, seed: int, directory: Path) -> Path:
    """Train a small network with a problem of a kind."""
    generator = torch.Generator().manual_seed(1000 * seed + list(KINDS).index(kind))
    random = np.random.default_rng([seed, 99, list(KINDS).index(kind)])
    torch.manual_seed(int(random.integers(1 << 30)))
    steps, data = int(random.integers(250, 500)), _Data(generator)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    lr, bound = 0.1 * random.uniform(0.5, 1.5), 10.0
    if kind in ("learning rate too high", "no warm-up", "bad sample"):
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    if kind == "learning rate too high":
        lr, bound = 10.0 * random.uniform(1, 4), math.inf
    elif kind == "no warm-up":
        bound = math.inf
    elif kind == "bad sample":
        lr, bound = 0.05, 1.0
    elif kind == "dominant tensor":
        data.inputs *= 24
        model, lr = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)), 1e-4
        bound = 1000.0
    elif kind == "bound too low":
        bound = 0.02 * random.uniform(0.5, 2)
    precision = "fp16" if kind == "fp16" else "fp32"
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr)
    if kind == "no warm-up":
        # Its first steps are √(1 / (1 - alpha)) = 10 times as large as later ones.
        optimizer = torch.optim.RMSprop(model.parameters(), 0.06 * random.uniform(0.8, 1.2), alpha=0.99)
    clipper = GradClipper(model, global_norm(bound))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=1_000_000) if kind == "fp16" else None
    overflows = set(random.choice(np.arange(60, steps), 12, replace=False).tolist())
    faults = set(random.choice(np.arange(60, steps - 1, 5), 4, replace=False).tolist())
    facts = {"batch": 16, "precision": precision, "dataset_size": 256}
    recorder = Recorder(clipper, directory, per_tensor=True, facts=facts)
    with recorder:
        for step, (ids, inputs, labels) in enumerate(data.batches(steps)):
            optimizer.zero_grad()
            if kind == "no warm-up" and step == 30:
                optimizer.param_groups[0]["lr"] *= 0.1
            if kind == "bad sample" and 7 in ids:
                inputs = torch.where((ids == 7).unsqueeze(1), 80 * torch.randn(12, generator=generator), inputs)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
            grads = [param.grad.view(-1) for param in model.parameters() if param.grad is not None]
            if kind == "fp16" and step in overflows:
                grads[int(random.integers(len(grads)))][0] = math.inf
            if kind == "hardware fault" and step in faults:
                grad = grads[int(random.integers(len(grads)))]
                grad[int(random.integers(len(grad)))] = 10.0 ** random.uniform(5, 30)
            clipper.step(optimizer, scaler)
            if scaler is not None:
                scaler.update()
            recorder.note(loss=loss.item(), ids=ids.tolist())
    return directory


if __name__ == "__main__":
    main()
