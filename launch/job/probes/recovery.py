"""Measure how many steps the loss needs to recover from one bad step."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .probe import Metric, Probe

# Losses scatter from batch to batch, so they are averaged over these numbers of steps.
NUM_BEFORE, NUM_AHEAD = 20, 5


class Recovery(Probe):
    """Losses after a step, compared with the losses before it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def finish(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Metric]:
        losses = {row["step"]: row["loss"] for row in rows}
        # The loss of a step is computed before its update, so the next step is the first one affected.
        before = [loss for step, loss in losses.items() if self.step - NUM_BEFORE < step <= self.step]
        after = [loss for step, loss in losses.items() if step > self.step]
        usual = fmean(before) if before else math.nan
        worst = max(after[:NUM_BEFORE], key=lambda loss: loss if math.isfinite(loss) else math.inf, default=math.nan)
        return [
            Metric("loss_before", f"loss before step {self.step}", usual),
            Metric("loss_after", f"largest of the {NUM_BEFORE} after", worst),
            Metric("recovery", "steps to recover", steps_to_recover(after, usual), "{:.0f}"),
        ]


def steps_to_recover(losses: Sequence[float], usual: float) -> float:
    """Return the number of losses after which the mean of the next `NUM_AHEAD` is at most `usual`.

    The result is infinity if it never is.
    """
    starts = range(len(losses) - NUM_AHEAD + 1)
    return next((i for i in starts if fmean(losses[i : i + NUM_AHEAD]) <= usual), math.inf)
