"""Write a run's config and summary, next to the metrics.jsonl of its recorder."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from distclip import Incident
from distclip.monitor.jsonl import finite

from .data import Data
from .probes.probe import Metric
from .processes import RANK

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Results of a run: a column of the closing table, and summary.json."""

    steps: int
    held_out: float
    guess: float
    norms: dict[str, float]
    """Percentiles of the finite norms."""
    nonfinite: int
    """Number of steps with a non-finite norm."""
    first_nonfinite: int | None
    """Step of the first non-finite norm."""
    skipped: int
    zeroed: int
    incidents: list[Incident]
    """Non-finite steps, with the parameters and ranks that caused them."""
    r2: float | None
    measures: list[Metric]
    """Metrics of the run's probe. In summary.json their names are keys."""
    clip_rate: float
    seconds: float
    directory: str


class RunLog:
    """Files of a run. Only rank 0 writes.

    `rows` is filled on the rank that records the run, which is rank 0.
    """

    def __init__(self, directory: Path, cfg: DictConfig) -> None:
        self.rows: list[Row] = []
        self.directory = directory
        if RANK == 0:
            directory.mkdir(parents=True, exist_ok=True)
            # If the job is killed here, the old file stays complete.
            OmegaConf.save(cfg, directory / "config.yaml.unfinished", resolve=True)
            (directory / "config.yaml.unfinished").replace(directory / "config.yaml")

    def add(self, numbers: dict[str, float], step: int) -> None:
        """Collect a recorded step. This is a sink of the recorder."""
        self.rows.append({"step": step, **numbers})

    @property
    def clip_rate(self) -> float:
        """Fraction of the recorded steps that were clipped."""
        return sum(bool(row["clipped"]) for row in self.rows) / len(self.rows)

    def summarize(
        self, held_out: float, data: Data, seconds: float, metrics: list[Metric], incidents: Sequence[Incident]
    ) -> Summary:
        """Write summary.json and return the summary."""
        all_norms = np.array([row["norm"] for row in self.rows])
        norms = all_norms[np.isfinite(all_norms)]
        levels = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
        summary = Summary(
            steps=self.rows[-1]["step"],
            held_out=held_out,
            guess=data.guess,
            norms={k: float(np.percentile(norms, p)) if len(norms) else math.nan for k, p in levels.items()},
            nonfinite=len(all_norms) - len(norms),
            first_nonfinite=next((row["step"] for row in self.rows if not math.isfinite(row["norm"])), None),
            skipped=sum(row["skipped"] for row in self.rows),
            # After elements are set to zero, the norm is measured again, and is then finite.
            zeroed=sum("nonfinite" in row and row["finite"] for row in self.rows),
            incidents=list(incidents),
            r2=None if data.variance is None else 1 - held_out / data.variance,
            measures=metrics,
            clip_rate=self.clip_rate,
            seconds=seconds,
            directory=str(self.directory),
        )
        plain = asdict(summary)
        del plain["measures"]
        plain |= {metric.name: metric.value for metric in metrics}
        text = json.dumps(finite(plain), indent=2, allow_nan=False)
        (self.directory / "summary.json").write_text(text + "\n")
        return summary
