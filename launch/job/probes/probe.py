"""Define probes, which observe a run and add rows to the closing table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distclip import Report


@dataclass(frozen=True)
class Metric:
    """A number of one run: a row of the closing table, and a value of summary.json."""

    name: str
    title: str
    value: float
    form: str = "{:.3g}"


class Probe:
    """An observer of a run's gradients before and after clipping. This one records nothing."""

    whole_gradients = False
    """True if every rank must hold whole gradients."""

    def start(self, module: nn.Module) -> None:
        """Prepare to observe the distributed model."""

    def before_clipping(self) -> None:
        """Read the gradients of a step before they are clipped."""

    def after_step(self, report: Report) -> dict[str, float]:
        """Return additional columns for the step's row in metrics.jsonl."""
        return {}

    def finish(self, rows: Sequence[dict[str, Any]], directory: Path) -> list[Metric]:
        """Return the metrics of the run. Rank 0 calls it after the last step.

        Args:
            rows: all rows of metrics.jsonl.
            directory: run directory, for files.
        """
        return []
