"""Measure where the starts of model=cliff end, and draw some of their paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distclip import Report

from ..models.cliff import TARGET, Cliff, output
from . import landscape
from .probe import Metric, Probe

SOLVED_LOSS = 1e-3
"""Loss below which a problem counts as solved. Its output is then within 0.03 of the target."""
THROWN_DISTANCE = 10.0
"""Distance from its start beyond which a problem counts as thrown over the cliff by one step."""


class Descent(Probe):
    """Paths of all starts.

    Args:
        paths: number of drawn paths from the steepest starts, which reach the cliff, and from other starts.
    """

    whole_gradients = True

    def __init__(self, paths: int) -> None:
        self.paths = paths

    def start(self, module: nn.Module) -> None:
        part = next((part for part in module.modules() if isinstance(part, Cliff)), None)
        if part is None:
            raise SystemExit("probe=cliff: needs model=cliff. Use experiment=cliff")
        self._points = part.starts
        self._first = self._points.detach().cpu().clone()
        self._path: list[Tensor] = []
        self._clip_rates: list[float] = []

    def before_clipping(self) -> None:
        if not self._path:
            assert self._points.grad is not None
            steepest = self._points.grad.norm(dim=1).argsort(descending=True).cpu()
            # The starts were drawn at random, so the first ones of the others are a random sample.
            self._drawn = torch.cat([steepest[: self.paths], steepest[self.paths :].sort().values[: self.paths]])
            self._path.append(self._first[self._drawn])

    def after_step(self, report: Report) -> dict[str, float]:
        self._path.append(self._points.detach().cpu()[self._drawn])
        self._clip_rates.append(float((report.coefs < 1).double().mean()))
        return {}

    def finish(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Metric]:
        last = self._points.detach().cpu()
        losses = (output(last) - TARGET).square()
        distances = (last - self._first).norm(dim=1)
        clip_rate = sum(self._clip_rates) / len(self._clip_rates)
        solved = float((losses < SOLVED_LOSS).double().mean())
        thrown = float((distances > THROWN_DISTANCE).double().mean())
        landscape.write(directory / "figures" / "cliff.json", torch.stack(self._path, dim=1))
        return [
            Metric("solved", "solved", solved, "{:.1%}"),
            Metric("thrown", f"thrown farther than {THROWN_DISTANCE:.0f}", thrown, "{:.1%}"),
            Metric("moved_max", "largest distance", float(distances.max())),
            Metric("clipped_starts", "clipped (starts x steps)", clip_rate, "{:.2%}"),
        ]
