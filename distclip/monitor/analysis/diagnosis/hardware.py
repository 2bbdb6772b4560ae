"""Find signs of faulty hardware: single steps with gradients that neither data nor precision explain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..formatting import format_list, format_number, pluralize
from ..log import Log
from ..statistics import robust_scale
from .context import Context, Finding

__all__ = ["check_hardware"]

MIN_RATIO = 100.0
"""Minimum ratio of a corrupted norm to the norms around it.

A flipped bit of the exponent changes a number by a power of 2, in most cases by a large one.
"""

NEIGHBOURS = 32
"""Number of losses before and after a step that its loss is compared with."""

MAX_DEVIATIONS = 4.0
"""Maximum distance of an ordinary loss from its neighbours, in robust standard deviations."""

ADVICE = (
    "Repeat the step from a checkpoint: a fault of the hardware does not come again. Run the vendor's memory and "
    'compute tests on the named ranks, and keep on_nonfinite="skip" and a bound until the host is replaced.'
)


@dataclass(frozen=True, slots=True)
class _Event:
    """A step whose gradient was corrupted, while its loss was ordinary."""

    step: int
    norm: float
    tensors: frozenset[str]
    ranks: frozenset[int]


def check_hardware(context: Context) -> Iterator[Finding]:
    """Find replicas that differ, and corrupted gradients in tensors that change or on one rank of several."""
    log = context.log
    if log.differences:
        steps = list(dict.fromkeys(difference.step for difference in log.differences))
        names = list(dict.fromkeys(difference.name for difference in log.differences))
        ranks = sorted({rank for difference in log.differences for rank in difference.ranks})
        where = f" on rank{'s' * (len(ranks) > 1)} {format_list(ranks, 8)}" if ranks else ""
        yield Finding(
            "hardware",
            "Replicas differ",
            f"The replicas of {format_list(names, 4)} differed{where}, first at step {steps[0]}, and in "
            f"{pluralize(len(steps), 'step')} in all.",
            "Replicas that were equal differ after a fault of the hardware, or if ranks compute with different data or "
            'code. Compare the ranks\' weights, and use replicas="repair" to train on.',
        )
        return
    if context.is_fp16 or "scale" in log.columns:
        return
    events = list(_find_events(context))
    tensors = Counter(name for event in events for name in event.tensors)
    ranks_of = Counter(rank for event in events for rank in event.ranks)
    world_size = log.header.get("world_size", 1)
    one_rank = [rank for rank, count in ranks_of.items() if count == len(events) >= 3]
    is_elsewhere = len(events) >= 2 and len(tensors) >= 2 and max(tensors.values()) < len(events)
    is_on_one = len(one_rank) == 1 and isinstance(world_size, int) and world_size > 1
    if not (is_elsewhere or is_on_one):
        return
    on = f", always on rank {one_rank[0]}" if is_on_one else ""
    norms = format_list(
        [
            f"{format_number(event.norm) if math.isfinite(event.norm) else 'not finite'} (step {event.step})"
            for event in events
        ],
        4,
    )
    yield Finding(
        "hardware",
        "Gradients were corrupted, while the losses were ordinary",
        f"The norms of {len(events)} single steps are {norms}, {MIN_RATIO:g} times those around them or more, in "
        f"{format_list(list(tensors), 4)}{on}. The losses of these steps are ordinary, so that the data is not the "
        "cause, and the precision has the range for such numbers.",
        ADVICE,
    )


def _find_events(context: Context) -> Iterator[_Event]:
    """Yield single steps with a corrupted gradient and an ordinary loss."""
    log = context.log
    tensors: dict[int, set[str]] = {}
    ranks: dict[int, set[int]] = {}
    for spike in log.spikes:
        if spike.tensor is not None:
            tensors.setdefault(spike.step, set()).add(spike.tensor)
        if spike.rank is not None:
            ranks.setdefault(spike.step, set()).add(spike.rank)
    for culprit in log.culprits:
        tensors.setdefault(culprit.step, set()).add(culprit.name)
        ranks.setdefault(culprit.step, set()).update(culprit.ranks)
    median = float(np.nanmedian(log.norms)) if np.isfinite(log.norms).any() else math.nan
    stands_out = ~log.finite | (log.norms > MIN_RATIO * median)
    for index in np.flatnonzero(stands_out).tolist():
        alone = not stands_out[max(0, index - 1)] or index == 0
        alone &= index + 1 == len(stands_out) or not stands_out[index + 1]
        step = int(log.steps[index])
        if alone and step in tensors and _is_ordinary_loss(log, index):
            yield _Event(step, float(log.norms[index]), frozenset(tensors[step]), frozenset(ranks.get(step, ())))


def _is_ordinary_loss(log: Log, index: int) -> bool:
    """Return whether the loss of a step is finite, and near those around it."""
    losses = log.columns.get("loss")
    if losses is None or not math.isfinite(losses[index]):
        return False
    near = losses[max(0, index - NEIGHBOURS) : index + NEIGHBOURS + 1]
    near = near[np.isfinite(near)]
    deviation = losses[index] - float(np.median(near))
    return bool(deviation <= MAX_DEVIATIONS * robust_scale(near - np.median(near)) + 1e-6 * abs(losses[index]))
