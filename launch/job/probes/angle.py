"""Measure the angle by which clipping turns a gradient: 0 if clipped by norm, large if clipped by value."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distclip import Report

from .probe import Metric, Probe


def degrees(a: Tensor, b: Tensor) -> float:
    """Return the angle between two vectors in degrees.

    The angle is NaN if exactly one of them is zero, or if one is not finite.
    """
    a, b = a.double(), b.double()
    if torch.equal(a, b):
        return 0.0
    # Kahan's formula. An arc cosine would have an error of 1e-6 for equal vectors.
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


class Angle(Probe):
    """Angle between the whole gradient before and after clipping, in degrees: the column `angle`."""

    whole_gradients = True

    def start(self, module: nn.Module) -> None:
        self._module = module

    def before_clipping(self) -> None:
        self._unclipped = self._copy_gradient()

    def after_step(self, report: Report) -> dict[str, float]:
        return {"angle": degrees(self._unclipped, self._copy_gradient())}

    def finish(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Metric]:
        angles = torch.tensor([row["angle"] for row in rows], dtype=torch.float64)
        angles = angles[angles.isfinite()]
        largest = float(angles.max()) if len(angles) else math.nan
        return [
            Metric("angle_mean", "angle, mean", float(angles.mean()), "{:.1f}°"),
            Metric("angle_max", "angle, largest", largest, "{:.1f}°"),
        ]

    def _copy_gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self._module.parameters() if p.grad is not None])
