"""What a run leaves behind beside its recorder's lines: its config and its outcome."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data import Data
from distclip import Incident
from distclip.monitor.jsonl import finite
from probe import Measure
from processes import RANK

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    steps: int
    held_out: float
    guess: float
    norms: dict[str, float]
    """Percentiles of those that are finite."""
    nonfinite: int
    first_nonfinite: int | None
    """At which step."""
    skipped: int
    zeroed: int
    incidents: list[dict[str, Any]]
    """The last steps that were not finite: what was done, and which parameters on which ranks are to blame."""
    r2: float | None
    measures: list[Measure]
    """What the run's probe has to say; each by its name in summary.json."""
    clip_rate: float
    seconds: float
    directory: str


class Record:
    """Collects rows on the rank whose recorder writes, rank 0, and writes there."""

    def __init__(self, directory: Path, cfg: DictConfig) -> None:
        self.rows: list[Row] = []
        self.directory = directory
        if RANK == 0:
            directory.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(cfg, directory / "config.yaml", resolve=True)

    def add(self, numbers: dict[str, float], step: int) -> None:
        """A recorder's sink."""
        self.rows.append({"step": step, **numbers})

    @property
    def clip_rate(self) -> float:
        return sum(bool(row["clipped"]) for row in self.rows) / len(self.rows)

    def close(
        self, held_out: float, data: Data, seconds: float, measures: list[Measure], incidents: Sequence[Incident]
    ) -> Outcome:
        every = np.array([row["norm"] for row in self.rows])
        norms = every[np.isfinite(every)]
        levels = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
        outcome = Outcome(
            steps=self.rows[-1]["step"],
            held_out=held_out,
            guess=data.guess,
            norms={k: float(np.percentile(norms, p)) if len(norms) else math.nan for k, p in levels.items()},
            nonfinite=len(every) - len(norms),
            first_nonfinite=next((row["step"] for row in self.rows if not math.isfinite(row["norm"])), None),
            skipped=sum(row["skipped"] for row in self.rows),
            # What is left after elements were set to zero is finite.
            zeroed=sum("nonfinite" in row and row["finite"] for row in self.rows),
            incidents=[asdict(incident) for incident in incidents],
            r2=None if data.variance is None else 1 - held_out / data.variance,
            measures=measures,
            clip_rate=self.clip_rate,
            seconds=seconds,
            directory=str(self.directory),
        )
        plain = asdict(outcome) | {"measures": {each.name: each.value for each in measures}}
        summary = json.dumps(finite(plain | plain.pop("measures")), indent=2, allow_nan=False)
        (self.directory / "summary.json").write_text(summary + "\n")
        return outcome
