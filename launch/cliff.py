"""The cliff of Pascanu, Mikolov, Bengio 2013, figure 6: a network of one unit whose loss has a wall.

x ← w·sigmoid(x) + b, fifty times from 0.5; the loss is (sigmoid(x) − 0.7)². Every row of the one parameter is a problem
of its own, (w, b) with a start of its own, and `clip.per=row` clips each on its own.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import landscape
from data import Batch, Data
from distclip import Report
from probe import Measure, Probe

UNROLLED = 50
TARGET = 0.7
SOLVED = 1e-3
"""Of the loss: an output within 0.03 of the target."""
THROWN = 10.0
"""How far from its start a problem ends that one step has thrown over the wall."""


def output(starts: Tensor) -> Tensor:
    """Of the network with each (w, b) in the last dimension."""
    w, b = starts.unbind(-1)
    x = torch.full_like(w, 0.5)
    for _ in range(UNROLLED):
        x = w * torch.sigmoid(x) + b
    return torch.sigmoid(x)


def total_error(out: Tensor, target: Tensor) -> Tensor:
    """The sum, so that no problem's gradient depends on how many others there are."""
    return (out - target.mean()).square().sum()


def problem(batch: int) -> Data:
    """No data but the target: whatever the batch."""
    one = Batch(torch.zeros(batch, 1), torch.full((batch, 1), TARGET), False, torch.zeros(1, dtype=torch.int64))

    def passes(seed: int) -> Iterator[Batch]:
        while True:
            yield one

    return Data(passes, [one], total_error, 1, math.nan, "samples", None, 1)


class Cliff(nn.Module):
    def __init__(self, starts: Tensor) -> None:
        super().__init__()
        self.starts = nn.Parameter(starts)

    def forward(self, x: Tensor) -> Tensor:
        return output(self.starts)


def cliff(data: Data, starts: int, w: Sequence[float], b: Sequence[float]) -> nn.Sequential:
    """So many starts, drawn evenly from the ranges of w and b."""
    if data.criterion is not total_error:
        raise SystemExit("model=cliff has a target of its own: write model=cliff data=cliff")
    low, high = (torch.tensor(ends, dtype=torch.float64) for ends in zip(w, b, strict=True))
    return nn.Sequential(Cliff(low + (high - low) * torch.rand(starts, 2, dtype=torch.float64)))


class Descent(Probe):
    """Follows every start; draws the paths of so many of the steepest, which meet the wall, and of as many others."""

    whole = True

    def __init__(self, paths: int) -> None:
        self.paths = paths

    def watch(self, module: nn.Module) -> None:
        part = next((part for part in module.modules() if isinstance(part, Cliff)), None)
        if part is None:
            raise SystemExit("probe=cliff follows the starts of model=cliff: write experiment=cliff")
        self._at = part.starts
        self._first = self._at.detach().cpu().clone()
        self._places: list[Tensor] = []
        self._clipped: list[float] = []

    def before(self) -> None:
        if not self._places:
            assert self._at.grad is not None
            steepest = self._at.grad.norm(dim=1).argsort(descending=True).cpu()
            # Drawn at random, so that the next best are any.
            self._drawn = torch.cat([steepest[: self.paths], steepest[self.paths :].sort().values[: self.paths]])
            self._places.append(self._first[self._drawn])

    def after(self, report: Report) -> dict[str, float]:
        self._places.append(self._at.detach().cpu()[self._drawn])
        self._clipped.append(float((report.coefs < 1).double().mean()))
        return {}

    def close(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Measure]:
        last = self._at.detach().cpu()
        losses = (output(last) - TARGET).square()
        moved = (last - self._first).norm(dim=1)
        landscape.write(directory / "figures" / "cliff.json", torch.stack(self._places, dim=1))
        return [
            Measure("solved", "solved", float((losses < SOLVED).double().mean()), "{:.1%}"),
            Measure("thrown", f"thrown more than {THROWN:.0f} away", float((moved > THROWN).double().mean()), "{:.1%}"),
            Measure("moved_max", "moved at most", float(moved.max())),
            Measure("clipped_starts", "clipped, of starts x steps", sum(self._clipped) / len(self._clipped), "{:.2%}"),
        ]
