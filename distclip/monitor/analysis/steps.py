"""What lines say one after another: a header begins a session, a step that comes again takes the place of the first."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .columns import Columns
from .errors import RunError
from .reading import Line, Reader
from .spikes import Culprit, Spike, culprits_in, spike_in
from .tensors import TensorNorms

__all__ = ["Session", "Steps"]

MOST = 10_000
"""Spikes, and culprits, to keep."""

KEPT = {"norms", "tensor_norms", "spike", "ids", "worst", "culprits"}
"""Of single steps, beside the columns."""


@dataclass(frozen=True, slots=True)
class Session:
    """What one process recorded, from opening the file on.

    Args:
        start: the first step of it.
        header: what its recorder said of the run.
    """

    start: int
    header: Mapping[str, Any]


class Steps:
    """All that is known after the lines so far."""

    def __init__(self) -> None:
        self.columns = Columns()
        self.tensors = TensorNorms()
        self.spikes: list[Spike] = []
        self.culprits: list[Culprit] = []
        self.sessions: list[Session] = []
        self.strange = 0
        """Lines with a norm whose step is no whole number."""
        self.keys: dict[str, None] = {}
        """Of lines that are neither a header nor a step: the first few."""
        self._header: Line | None = None
        self._names: tuple[str, ...] = ()
        self._key = ""

    def add(self, lines: Sequence[Line]) -> None:
        """The next lines."""
        steps: list[int] = []
        rows: list[Line] = []
        last = self.columns.steps[-1] if self.columns.steps else -math.inf
        for line in lines:
            if "norm" in line and "step" in line and "distclip" not in line:
                step = _whole(line["step"])
                if step is None:
                    self.strange += 1
                    continue
                if step <= last or self._header is not None:
                    self._append(steps, rows)
                    steps, rows = [], []
                    self._begin(step)
                steps.append(step)
                rows.append(line)
                last = step
            elif "distclip" in line:
                self._append(steps, rows)
                steps, rows = [], []
                self._header = line
            elif len(self.keys) < 8:
                self.keys.update(dict.fromkeys(line))
        self._append(steps, rows)

    def check(self, lines: Reader) -> None:
        """That there is something to look at.

        Raises:
            RunError: not one step with a norm.
        """
        if self.columns.steps:
            return
        path, wanted = lines.path, 'lines as a distclip.monitor.Recorder writes them: {"step": 1, "norm": 0.7, …}'
        if not lines.read:
            raise RunError(f"{path} is empty: no step was recorded")
        if self.strange:
            raise RunError(f'{path} has norms, but no "step" in it is a whole number: wanted are {wanted}')
        if self.keys:
            seen = ", ".join(list(self.keys)[:8])
            raise RunError(f'{path} has no line with a "step" and a "norm", only {seen}: wanted are {wanted}')
        if self._header is not None:
            raise RunError(
                f"{path} has a header and no steps: the run ended before any was written{_every(self._header)}"
            )
        raise RunError(f"{path} has no line that is a JSON object: wanted are {wanted}")

    def _begin(self, step: int) -> None:
        """A new session, or an old step again."""
        self.columns.drop_from(step)
        self.tensors.drop_from(step)
        for kept in (self.spikes, self.culprits):
            del kept[bisect_left([each.step for each in kept], step) :]
        if self._header is not None:
            while self.sessions and self.sessions[-1].start >= step:
                self.sessions.pop()
            self.sessions.append(Session(step, self._header))
            tensors, slots = (_names(self._header.get(key)) for key in ("tensors", "slots"))
            self._key, self._names = ("tensor_norms", tensors) if tensors else ("norms", slots)
            self._header = None

    def _append(self, steps: Sequence[int], lines: Sequence[Line]) -> None:
        if not steps:
            return
        self.columns.add(steps, lines)
        if KEPT.isdisjoint(key for layout in set(map(tuple, lines)) for key in layout):
            return
        for step, line in zip(steps, lines, strict=True):
            if self._key in line and isinstance(norms := line[self._key], list):
                self.tensors.add(step, self._names, norms)
            if (spike := spike_in(step, line)) is not None:
                self.spikes.append(spike)
            if "culprits" in line and len(self.culprits) < MOST:
                self.culprits += culprits_in(step, line)
        if len(self.spikes) > 2 * MOST:
            worst = sorted(self.spikes, key=_extremity, reverse=True)
            self.spikes = sorted(worst[:MOST], key=lambda each: each.step)


def _whole(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(1 << 63) <= value < 1 << 63 else None


def _extremity(spike: Spike) -> float:
    if math.isnan(spike.norm):
        return math.inf
    return 0.0 if math.isnan(spike.ratio) else spike.ratio


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _every(header: Line) -> str:
    every = header.get("every")
    return f", which was to be every {every} steps" if isinstance(every, int) else ""
