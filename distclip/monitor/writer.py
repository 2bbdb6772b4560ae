"""Write the lines to the file and to sinks, on the one rank that writes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..clipper import GradClipper
from ..policies.description import describe
from .alerts import Alert, make_alert
from .jsonl import FORMAT, MIN_BETWEEN_UPDATES, JsonLines
from .outliers import RankDetails, merge_details
from .sinks import Sink
from .step_buffer import VECTORS, Step

__all__ = ["Writer", "step_number"]

_FIRST = ("norm", "bound", "coef", "clipped", "finite", "skipped")
"""Fields at the start of a line, where people look first."""

Destination = Callable[[Sequence[Mapping[str, Any]]], None]


class Writer:
    """Writes lines to the file and to sinks.

    A destination that raises gets no more lines. The writer itself never raises, because the other ranks would wait for
    this one.

    Args:
        clipper: clipper that makes the steps.
        lines: file of the run.
        sinks: further destinations.
        every: see `Recorder`.
        facts: facts for the header.
        alerts: functions to call for outliers.
    """

    def __init__(
        self,
        clipper: GradClipper,
        lines: JsonLines,
        sinks: Sequence[Sink],
        every: int,
        facts: Mapping[str, Any],
        alerts: Sequence[Alert] = (),
    ) -> None:
        self._clipper = clipper
        # A header goes to the file only.
        self._destinations: list[Destination] = [_to_file(lines)]
        self._send([_make_header(clipper, every) | dict(facts)])
        self._destinations += [self._to_sink(sink) for sink in sinks]
        self._destinations += [_to_alert(alert, lines.path, clipper) for alert in alerts]

    def write(
        self,
        steps: Sequence[Step],
        rows: Sequence[dict[str, Any]],
        outliers: Sequence[tuple[int, float]],
        details: Sequence[Sequence[RankDetails]],
        ranks: Sequence[int],
    ) -> None:
        """Compose the lines and write them.

        Args:
            steps: steps in order.
            rows: numbers and notes of each step.
            outliers: (index, ratio) of the outliers.
            details: details of these steps, by rank.
            ranks: numbers of the ranks.
        """
        _try_to_send(lambda lines: self._send(self._compose(steps, rows, outliers, details, ranks)), [])

    def _compose(
        self,
        steps: Sequence[Step],
        rows: Sequence[dict[str, Any]],
        outliers: Sequence[tuple[int, float]],
        details: Sequence[Sequence[RankDetails]],
        ranks: Sequence[int],
    ) -> list[dict[str, Any]]:
        fields: dict[int, dict[str, Any]] = {}
        for incident in self._clipper.incidents:
            fields.setdefault(incident.step, {}).update(incident.as_fields())
        lines: list[dict[str, Any]] = []
        for step, row in zip(steps, rows, strict=True):
            head = {"step": step_number(row.pop("step", step.number), step), "time": round(step.time, 3)}
            line = head | {key: row.pop(key) for key in _FIRST if key in row}
            # Vectors are long, and come at the end of the line.
            line |= {key: value for key, value in row.items() if key not in VECTORS}
            line |= {key: row[key] for key in VECTORS if key in row}
            lines.append(line | fields.get(step.number, {}))
        for n, (i, ratio) in enumerate(outliers):
            by_rank = [rank_details[n] for rank_details in details]
            lines[i] |= {"spike": ratio, **merge_details(by_rank, ranks, steps[i].power_sum)}
        return [line for step, line in zip(steps, lines, strict=True) if not step.is_undone]

    def _send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._destinations = [destination for destination in self._destinations if _try_to_send(destination, lines)]

    def _to_sink(self, sink: Sink) -> Destination:
        def send(lines: Sequence[Mapping[str, Any]]) -> None:
            for line in lines:
                sink(_select_numbers(line, self._clipper), line["step"])

        return send


def _to_file(lines: JsonLines) -> Destination:
    def send(rows: Sequence[Mapping[str, Any]]) -> None:
        lines.append(
            [{**row, **{key: lines.convert_vector(row[key]) for key in VECTORS if key in row}} for row in rows]
        )

    return send


def _to_alert(alert: Alert, path: Path, clipper: GradClipper) -> Destination:
    last_update = -MIN_BETWEEN_UPDATES

    def send(lines: Sequence[Mapping[str, Any]]) -> None:
        nonlocal last_update
        names = clipper.tensors or clipper.slots
        for line in lines:
            fields = make_alert(line, path, names)
            if fields is not None and fields["kind"] == "update":
                # Moments that are too old stay so for some steps, and one alert is enough.
                is_new = abs(line["step"] - last_update) >= MIN_BETWEEN_UPDATES
                last_update = line["step"]
                fields = fields if is_new else None
            if fields is not None:
                alert(fields)

    return send


def step_number(noted: Any, step: Step) -> int:
    """Return the number of a step that the user noted, or else the clipper's own."""
    # A tensor on an accelerator was not checked before, so it may be NaN.
    return int(noted) if isinstance(noted, int) or (isinstance(noted, float) and noted.is_integer()) else step.number


def _try_to_send(destination: Destination, lines: Sequence[Mapping[str, Any]]) -> bool:
    try:
        destination(lines)
    except Exception as error:
        warnings.warn(
            f"recorder: {type(error).__name__}: {error}. This destination gets no more lines. Training continues.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _make_header(clipper: GradClipper, every: int) -> dict[str, Any]:
    header: dict[str, Any] = {
        "distclip": __version__,
        "format": FORMAT,
        "time": round(time.time(), 3),
        "policy": describe(clipper.policy),
        "per": clipper.policy.spec.per,
        "every": every,
        "world_size": clipper.comm.size,
    }
    # Row names are left out, because there are as many as rows of all parameters.
    if clipper.policy.spec.per != "row":
        header["slots"] = clipper.slots
    if clipper.tensors:
        header["tensors"] = clipper.tensors
    return header


def _select_numbers(line: Mapping[str, Any], clipper: GradClipper) -> dict[str, float]:
    """Return the numbers of a line by name. Numbers of slots and tensors have the names of these."""
    numbers: dict[str, float] = {}
    names = {"norms": clipper.slots, "tensor_norms": clipper.tensors}
    for key, value in line.items():
        if key in names:
            if len(names[key]) != len(value):
                continue  # Groups were added or removed after this step.
            numbers |= {f"{key}/{name}": norm for name, norm in zip(names[key], value.tolist(), strict=True)}
        elif isinstance(value, int | float) and key not in ("step", "time"):
            numbers[key] = value
    return numbers
