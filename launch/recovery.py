"""How long the loss takes to get over one bad step."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from probe import Measure, Probe

BEFORE, AHEAD = 20, 5
"""Over how many steps the loss is averaged, which scatters from batch to batch."""


class Recovery(Probe):
    """Compares the losses after a step with those before it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def close(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Measure]:
        losses = {row["step"]: row["loss"] for row in rows}
        # The loss of a step is that before its update: the first one to feel it is the next.
        before = [loss for step, loss in losses.items() if self.step - BEFORE < step <= self.step]
        after = [loss for step, loss in losses.items() if step > self.step]
        usual = fmean(before) if before else math.nan
        worst = max(after[:BEFORE], key=lambda loss: loss if math.isfinite(loss) else math.inf, default=math.nan)
        return [
            Measure("loss_before", f"loss before step {self.step}", usual),
            Measure("loss_after", f"worst of the {BEFORE} after", worst),
            Measure("recovery", "steps until it is back", recovery(after, usual), "{:.0f}"),
        ]


def recovery(losses: Sequence[float], usual: float) -> float:
    """After how many losses the next `AHEAD` are on average no higher than usual; infinity where they never are."""
    return next((i for i in range(len(losses) - AHEAD + 1) if fmean(losses[i : i + AHEAD]) <= usual), math.inf)
