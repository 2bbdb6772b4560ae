"""What looks on while a run trains, and has something to say of it in the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distclip import Report


@dataclass(frozen=True)
class Measure:
    """A number of one run: a line of the closing table, and of summary.json by its name."""

    name: str
    title: str
    value: float
    form: str = "{:.3g}"


class Probe:
    """Sees a run's gradients before and after clipping; this one has nothing to say of them."""

    whole = False
    """Whether every rank has to hold whole gradients."""

    def watch(self, module: nn.Module) -> None:
        """The placed model, before the first step."""

    def before(self) -> None:
        """Gradients are there, and not clipped yet."""

    def after(self, report: Report) -> dict[str, float]:
        """The step is done. Returns more columns of its row."""
        return {}

    def close(self, rows: Sequence[dict[str, Any]], directory: Path | None) -> list[Measure]:
        """After the last step; `directory`, on rank 0 only, is for files."""
        return []
