"""List the alarms of a run, as `Recorder(alerts=...)` sends them while the run is being written."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from ..jsonl import MIN_BETWEEN_UPDATES, UPDATE_RMS_ALARM
from .formatting import format_list, format_number, pluralize
from .log import Log
from .spikes import SPIKE_FACTOR, Culprit, Difference

__all__ = ["Alarm", "find_alarms", "find_update_alarms", "find_update_tensor"]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Alarm about an outlier step.

    Args:
        step: number of the step.
        kind: "nonfinite", "replicas", "spike" or "update".
        text: the fact and its evidence, in one line.
    """

    step: int
    kind: str
    text: str


def find_alarms(log: Log) -> list[Alarm]:
    """Return the alarms of a run in the order of their steps."""
    culprits: dict[int, list[Culprit]] = defaultdict(list)
    differences: dict[int, list[Difference]] = defaultdict(list)
    for culprit in log.culprits:
        culprits[culprit.step].append(culprit)
    for difference in log.differences:
        differences[difference.step].append(difference)
    alarms = [
        Alarm(
            step,
            "replicas",
            f"replicas of {pluralize(len(some), 'tensor')} differ: {format_list(d.name for d in some)}",
        )
        for step, some in differences.items()
    ]
    for spike in log.spikes:
        where = "" if spike.tensor is None else f", most of it in {format_list([spike.tensor])}"
        where += "" if spike.rank is None or spike.tensor is None else f" on rank {spike.rank}"
        if math.isnan(spike.norm):
            of = f": {format_list(culprits[spike.step])}" if spike.step in culprits else ""
            alarms.append(Alarm(spike.step, "nonfinite", f"the gradient norm is not finite{of}"))
        elif spike.ratio >= SPIKE_FACTOR:
            size, ratio = format_number(spike.norm), format_number(spike.ratio)
            text = f"the gradient norm is {size}, {ratio} times the median{where}"
            alarms.append(Alarm(spike.step, "spike", text))
    described = {alarm.step for alarm in alarms if alarm.kind == "nonfinite"}
    alarms += [
        Alarm(step, "nonfinite", f"gradients are not finite: {format_list(some)}")
        for step, some in culprits.items()
        if step not in described
    ]
    for index in find_update_alarms(log):
        of = find_update_tensor(log, index)
        rms = format_number(float(log.columns["update_rms"][index]))
        text = f"gradients{of and ' of '}{of} are {rms} times the roots of Adam's second moments"
        alarms.append(Alarm(int(log.steps[index]), "update", text))
    return sorted(alarms, key=lambda alarm: alarm.step)


def find_update_alarms(log: Log) -> list[int]:
    """Return the indices of steps whose gradients are too large for Adam's second moments.

    Moments that are too old stay so for some steps. Only the first of these steps counts.
    """
    if "update_rms" not in log.columns:
        return []
    starts, last = [], -MIN_BETWEEN_UPDATES
    for index in np.flatnonzero(log.columns["update_rms"] >= UPDATE_RMS_ALARM).tolist():
        if index - last >= MIN_BETWEEN_UPDATES:
            starts.append(index)
        last = index
    return starts


def find_update_tensor(log: Log, index: int) -> str:
    """Return the name of the tensor or slot with the largest update at a step, empty if unknown."""
    slots = log.header.get("slots")
    names = log.tensors if log.header.get("tensors") else slots if isinstance(slots, list) else ()
    slot = float(log.columns["update_slot"][index]) if "update_slot" in log.columns else -1.0
    return format_list([names[int(slot)]]) if len(names) > 1 and 0 <= slot < len(names) else ""
