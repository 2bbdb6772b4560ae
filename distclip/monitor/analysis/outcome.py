"""Find out how a run ended: diverged, recovered from an excursion, or healthy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .formatting import format_number
from .log import Log, once_per_log
from .statistics import Numbers, robust_scale

__all__ = ["MIN_STEPS", "Outcome", "Verdict", "find_outcome"]

Verdict: TypeAlias = Literal["diverged", "recovered", "healthy", "unknown"]

MIN_STEPS = 50
"""Minimum number of steps for a verdict, and for rules about how often something happens."""

TAIL = 0.05
"""Share of a run, at its end, whose losses count as its final loss."""

MAX_TAIL = 200
"""Maximum number of steps that the final loss is taken from."""

MAX_WINDOWS = 5000
"""Number of windows above which running medians are computed only for some of them."""

NUM_ERRORS = 3.0
"""A difference of two losses counts if it exceeds this number of standard errors."""

LOST = 0.5
"""Share of its progress that a diverged run has lost at its end, and that an excursion loses for a while."""

EXPLOSION = 3.0
"""Minimum factor between a loss and the first one if training explodes within the first steps."""

EXPLODED = 1000.0
"""Minimum factor between a loss and the first one in a run that has exploded."""

STUCK = 0.02
"""A run is not stuck if its loss ends below the chance level by at least this share of it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of a run, as a verdict with its evidence.

    Args:
        verdict: "diverged" if the loss ended above its start, above chance level, or not finite; "recovered" if that
            was so only for a while; "healthy"; "unknown" for a short run, or one without losses.
        text: the evidence in a sentence.
        loss: held-out loss if the run has one, otherwise the training loss at the end. NaN if unknown.
        start: training loss at the start. NaN if unknown.
    """

    verdict: Verdict
    text: str
    loss: float = math.nan
    start: float = math.nan


@once_per_log
def find_outcome(log: Log) -> Outcome:
    """Compare the losses at the end of a run with its first losses, its best losses and chance level.

    Args:
        log: log of any length. Its losses are the column "loss", and "held_out" and "guess" of its summary.
    """
    summary = log.summary or {}
    guess = _number({**log.header, **summary}, "guess", "blind_guess")
    held_out = _number(summary, "held_out")
    losses = _Losses(log)
    if (text := _find_nonfinite_end(log)) is not None:
        return Outcome("diverged", text, held_out, losses.start)
    if "held_out" in summary and summary["held_out"] is not None and not math.isfinite(held_out):
        return Outcome("diverged", "The held-out loss is not finite.", held_out, losses.start)
    loss = held_out if math.isfinite(held_out) else losses.end
    for text in _find_divergence(losses, held_out, guess):
        return Outcome("diverged", text, loss, losses.start)
    if len(log.steps) < MIN_STEPS:
        needed = f"A verdict needs {MIN_STEPS} steps, and the run has {len(log.steps)}."
        return Outcome("unknown", needed, loss, losses.start)
    if not losses.is_known:
        how = "Record it with recorder.note(loss=loss) after each step."
        return Outcome("unknown", f"The run recorded no loss. {how}", loss, losses.start)
    if (excursion := losses.worst_excursion) is not None:
        step, height = excursion
        text = (
            f"The loss rose to {format_number(height)} at step {step}, and ended at {format_number(losses.end)}, from "
            f"{format_number(losses.start)} at the start."
        )
        return Outcome("recovered", text, loss, losses.start)
    text = f"The loss went from {format_number(losses.start)} to {format_number(losses.end)}."
    return Outcome("healthy", text, loss, losses.start)


class _Losses:
    """Training losses of a run, and the numbers to compare.

    Args:
        log: log of the run.
    """

    def __init__(self, log: Log) -> None:
        values = log.columns.get("loss")
        indices = np.flatnonzero(np.isfinite(values)) if values is not None else np.zeros(0, np.int64)
        self.values: Numbers = values[indices] if values is not None else np.zeros(0)
        self.steps: NDArray[np.int64] = log.steps[indices]
        self.is_known = len(self.values) >= 2

    @cached_property
    def width(self) -> int:
        """Number of losses that are averaged."""
        return int(np.clip(TAIL * len(self.values), 3, MAX_TAIL))

    @cached_property
    def start(self) -> float:
        """Median of the first losses before any explosion. They are few, because a loss can fall quickly."""
        if not len(self.values):
            return math.nan
        first = self.values[: min(5, self.width)]
        exploded = np.flatnonzero(first > EXPLOSION * np.abs(first[0]))
        return float(np.median(first[: exploded[0]] if len(exploded) else first))

    @cached_property
    def end(self) -> float:
        """Median of the last losses."""
        return float(np.median(self.values[-self.width :])) if len(self.values) else math.nan

    @cached_property
    def smooth(self) -> Numbers:
        """Running medians of every `stride`-th window."""
        windows = sliding_window_view(self.values, min(self.width, len(self.values)))
        smooth: Numbers = np.median(windows[:: self.stride], axis=1)
        return smooth

    @property
    def stride(self) -> int:
        """Distance between the windows of `smooth`. In a run of up to a million steps they always overlap."""
        return max(1, len(self.values) // MAX_WINDOWS)

    @cached_property
    def best(self) -> float:
        """Least running median."""
        return float(self.smooth.min()) if len(self.values) else math.nan

    def error(self, stop: int | None = None) -> float:
        """Return the standard error of the difference of two running medians, up to a loss of this index."""
        part = self.values[:stop][-4 * self.width :]
        # Differences between neighbours have no trend, and twice the variance of a loss.
        scatter = robust_scale(np.diff(part)) / math.sqrt(2) if len(part) > 1 else 0.0
        # Each of the two medians has a standard error of 1.25 scatter / √n.
        return 1.25 * scatter * math.sqrt(2 / self.width)

    @cached_property
    def worst_excursion(self) -> tuple[int, float] | None:
        """Step and height of the highest loss at which half of the progress was lost, or None."""
        if len(self.values) < MIN_STEPS:
            return None
        best = np.minimum.accumulate(self.smooth)
        progress = self.start - best
        # If the progress does not exceed the scatter of single losses, it can be lost by chance.
        scatter = robust_scale(np.diff(self.values)) / math.sqrt(2)
        lost = (self.smooth > best + LOST * progress + NUM_ERRORS * self.error()) & (progress > 2 * scatter)
        if not lost.any():
            return None
        worst = int(np.where(lost, self.smooth, -np.inf).argmax())
        return int(self.steps[worst * self.stride + self.width // 2]), float(self.smooth[worst])


def _find_nonfinite_end(log: Log) -> str | None:
    """Describe the end of a run whose norms stop being finite."""
    finite = np.flatnonzero(log.finite)
    end = int(finite[-1]) + 1 if len(finite) else 0
    # A few skipped steps in a row are normal while a scaler searches for its scale.
    if len(log.steps) - end < max(10, 0.02 * len(log.steps)):
        return None
    return f"No norm is finite from step {log.steps[end]} to the end, step {log.steps[-1]}."


def _find_divergence(losses: _Losses, held_out: float, guess: float) -> Iterator[str]:
    """Yield the evidence that a run diverged."""
    if held_out > guess:
        yield f"The held-out loss {format_number(held_out)} is above chance level, {format_number(guess)}."
    if not losses.is_known or len(losses.values) < MIN_STEPS:
        return
    start, end, best, noise = losses.start, losses.end, losses.best, NUM_ERRORS * losses.error()
    went = f"The loss went from {format_number(start)} to {format_number(end)}"
    # A good held-out loss is stronger evidence than the losses of single batches.
    if held_out <= guess * (1 - STUCK):
        return
    # After an explosion, even a small rise is permanent.
    rise = 0.0 if losses.values.max() > EXPLODED * abs(start) else noise
    if end > start + max(rise, 1e-3 * abs(start)):
        yield f"{went}, above its start."
    if end > guess * (1 - STUCK) and guess > 0 and start >= end - noise:
        yield f"{went}. That is no better than chance level, {format_number(guess)}: training is stuck."
    scatter = robust_scale(np.diff(losses.values)) / math.sqrt(2)
    if start - best > 2 * scatter and end > best + LOST * (start - best) + noise:
        yield f"{went}, after it had been {format_number(best)}: the run lost most of its progress."


def _number(fields: Mapping[str, Any], *keys: str) -> float:
    """Return the first of these fields that is a number, or NaN."""
    for key in keys:
        value = fields.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return math.nan
