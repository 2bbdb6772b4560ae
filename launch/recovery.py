"""How long the loss takes to get over one bad step."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from probe import Measure, Probe

WINDOW = 20
"""Steps whose median is the usual loss: that of single batches scatters."""


class Recovery(Probe):
    """Compares the losses after a step with those before it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def close(self, rows: Sequence[dict[str, Any]], directory: Path | None) -> list[Measure]:
        losses = {row["step"]: row["loss"] for row in rows}
        before = [loss for step, loss in losses.items() if self.step - WINDOW < step <= self.step]
        # The loss of a step is that before its update: the first one to feel it is the next.
        after = [loss for step, loss in losses.items() if step > self.step]
        usual = median(before) if before else math.nan
        worst = max(after[:WINDOW], key=lambda loss: loss if math.isfinite(loss) else math.inf, default=math.nan)
        return [
            Measure("loss_before", f"loss before step {self.step}", usual),
            Measure("loss_after", f"worst of the {WINDOW} after", worst),
            Measure("recovery", "steps until it is back", recovered(after, usual), "{:.0f}"),
        ]


def recovered(losses: Sequence[float], usual: float) -> float:
    """After how many losses the median of the next `WINDOW` is no higher than usual; infinity where it never is."""
    return next((i for i in range(len(losses) - WINDOW + 1) if median(losses[i : i + WINDOW]) <= usual), math.inf)
