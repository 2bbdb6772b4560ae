"""What a run leaves behind: its config, a line of JSON for every step, and its outcome."""

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
from probe import Measure

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
    """Collects rows on every rank and writes them where a directory is given: on rank 0."""

    def __init__(self, directory: Path | None, cfg: DictConfig) -> None:
        self.rows: list[Row] = []
        self.incidents: Sequence[Incident] = ()
        self.zeroed = 0
        self.directory = directory
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
            (directory / "metrics.jsonl").write_text("")

    def add(self, rows: list[Row], incidents: Sequence[Incident]) -> None:
        """More rows, and the last incidents, of which some may be known already."""
        self.rows += rows
        known = self.incidents[-1].step if self.incidents else 0
        self.zeroed += sum(each.action == "zero" and each.step > known for each in incidents)
        self.incidents = incidents
        if self.directory is not None:
            with (self.directory / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)

    @property
    def clip_rate(self) -> float:
        return sum(bool(row["clipped"]) for row in self.rows) / len(self.rows)

    def close(self, held_out: float, data: Data, seconds: float, measures: list[Measure]) -> Outcome:
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
            zeroed=self.zeroed,
            incidents=[_plain(incident) for incident in self.incidents],
            r2=None if data.variance is None else 1 - held_out / data.variance,
            measures=measures,
            clip_rate=self.clip_rate,
            seconds=seconds,
            directory=str(self.directory),
        )
        if self.directory is not None:
            plain = asdict(outcome) | {"measures": {each.name: each.value for each in measures}}
            summary = json.dumps(_finite(plain | plain.pop("measures")), indent=2, allow_nan=False)
            (self.directory / "summary.json").write_text(summary + "\n")
        return outcome


def _plain(incident: Incident) -> dict[str, Any]:
    culprits = [
        {"name": each.name, "nans": each.nans, "infs": each.infs, "ranks": list(each.ranks)}
        for each in incident.culprits
    ]
    return {"step": incident.step, "action": incident.action, "culprits": culprits}


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
