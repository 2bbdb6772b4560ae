"""How far clipping turns a gradient: not at all by its norm, by the values of its elements rather far."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distclip import Report
from probe import Measure, Probe


def degrees(a: Tensor, b: Tensor) -> float:
    """The angle between two vectors, by Kahan's formula: exactly 0 for equal ones, where an arc cosine is 1e-6 off.

    NaN where one of them has no direction and the other has, or is not finite.
    """
    a, b = a.double(), b.double()
    if torch.equal(a, b):
        return 0.0
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


class Angle(Probe):
    """A column of metrics.jsonl, `angle`: in degrees, between the whole gradient before and after clipping."""

    whole = True

    def watch(self, module: nn.Module) -> None:
        self._module = module

    def before(self) -> None:
        self._unclipped = self._gradient()

    def after(self, report: Report) -> dict[str, float]:
        return {"angle": degrees(self._unclipped, self._gradient())}

    def close(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Measure]:
        angles = torch.tensor([row["angle"] for row in rows], dtype=torch.float64)
        angles = angles[angles.isfinite()]
        largest = float(angles.max()) if len(angles) else math.nan
        return [
            Measure("angle_mean", "turned, mean", float(angles.mean()), "{:.1f}°"),
            Measure("angle_max", "turned, at most", largest, "{:.1f}°"),
        ]

    def _gradient(self) -> Tensor:
        """A copy."""
        return torch.cat([p.grad.flatten() for p in self._module.parameters() if p.grad is not None])
