"""The one rank that writes: from steps and what ranks told of them to lines, to the file and to sinks."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from .._version import __version__
from ..clipper import GradClipper
from .jsonl import FORMAT, Lines
from .sinks import Sink
from .step_buffer import VECTORS, Step
from .told import Told, merged

__all__ = ["Writer"]

_FIRST = ("norm", "bound", "coef", "clipped", "finite", "skipped")
"""Fields in this order, for whoever reads a line."""


class Writer:
    """Writes for as long as that goes well: it must not stop its rank while the others wait for it.

    Args:
        clipper: whose steps they are.
        lines: of the run.
        sinks: where numbers go besides.
        every: see `Recorder`.
        facts: for the header.
    """

    def __init__(
        self, clipper: GradClipper, lines: Lines, sinks: Sequence[Sink], every: int, facts: Mapping[str, Any]
    ) -> None:
        self._clipper = clipper
        self._ways: list[Callable[[Sequence[Mapping[str, Any]]], None]] = [lines.append]
        self._try([_header(clipper, every) | dict(facts)])
        self._ways += [self._through(sink) for sink in sinks]

    def write(
        self,
        steps: Sequence[Step],
        rows: Sequence[dict[str, Any]],
        found: Sequence[tuple[int, float]],
        told: Sequence[Sequence[Told]],
        ranks: Sequence[int],
    ) -> None:
        """Put lines together and hand them on.

        Args:
            steps, rows: in order.
            found: (position, ratio) of those that stand out.
            told: of these, by every rank of `ranks`.
        """
        incidents = {incident.step: incident for incident in self._clipper.incidents}
        lines: list[dict[str, Any]] = []
        for step, row in zip(steps, rows, strict=True):
            first = {"step": int(row.pop("step", step.number)), "time": round(step.time, 3)}
            lines.append(first | {key: row.pop(key) for key in _FIRST if key in row} | _short(row))
            if (incident := incidents.get(step.number)) is not None:
                lines[-1]["nonfinite"] = sum(each.nans + each.infs for each in incident.culprits)
                lines[-1]["culprits"] = [asdict(each) for each in incident.culprits]
        known = set(self._clipper.parameters)
        for n, (i, ratio) in enumerate(found):
            lines[i] |= {"spike": ratio, **merged([of_rank[n] for of_rank in told], ranks, steps[i].power_sum, known)}
        self._try(lines)

    def _try(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._ways = [way for way in self._ways if _went_well(way, lines)]

    def _through(self, sink: Sink) -> Callable[[Sequence[Mapping[str, Any]]], None]:
        def way(lines: Sequence[Mapping[str, Any]]) -> None:
            for line in lines:
                sink(_numbers(line, self._clipper), line["step"])

        return way


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of norms with as many digits as anybody looks at, at the end."""
    whole = {key: value for key, value in row.items() if key not in VECTORS}
    return whole | {key: [float(f"{x:.6g}") for x in row[key]] for key in VECTORS if key in row}


def _went_well(way: Callable[[Sequence[Mapping[str, Any]]], None], lines: Sequence[Mapping[str, Any]]) -> bool:
    try:
        way(lines)
    except Exception as error:
        warnings.warn(
            f"recorder: {type(error).__name__}: {error}. Nothing more goes there; training goes on.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _header(clipper: GradClipper, every: int) -> dict[str, Any]:
    header: dict[str, Any] = {
        "distclip": __version__,
        "format": FORMAT,
        "time": round(time.time(), 3),
        "policy": _described(clipper.policy),
        "per": clipper.policy.spec.per,
        "every": every,
        "world_size": clipper.comm.size,
    }
    if clipper.policy.spec.per != "row":
        header["slots"] = clipper.slots
    if clipper.tensors:
        header["tensors"] = clipper.tensors
    return header


def _described(policy: Any) -> str:
    """As Python writes it, without what is as it is by default."""
    if not is_dataclass(policy):
        return re.sub(r" at 0x\w+", "", repr(policy))
    said = []
    for field in fields(policy):
        value = getattr(policy, field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if value != usual or is_dataclass(value) or field.name == "max_norm":
            said.append(f"{field.name}={_described(value)}")
    return f"{type(policy).__name__}({', '.join(said)})"


def _numbers(line: Mapping[str, Any], clipper: GradClipper) -> dict[str, float]:
    """Those of a line; of slots and tensors by their names."""
    numbers: dict[str, float] = {}
    names = {"norms": clipper.slots, "tensor_norms": clipper.tensors}
    for key, value in line.items():
        if key in names:
            numbers |= {f"{key}/{name}": norm for name, norm in zip(names[key], value, strict=True)}
        elif isinstance(value, int | float) and key not in ("step", "time"):
            numbers[key] = value
    return numbers
