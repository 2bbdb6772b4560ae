"""Count skipped steps, warn about them, and raise after too many, on every rank at the same step."""

from __future__ import annotations

from collections import deque

from ..errors import NonFiniteError, NonFiniteWarning, TooManySkippedSteps, warn_user
from .culprits import Culprit, Incident, describe_culprits

__all__ = ["POLICY_SKIPS", "SkipCounter", "describe_skip", "too_many_skips"]

POLICY_SKIPS = "the policy skipped this one: its norm, or a watched scalar, is finite and above the bound"
"""Reason of a step that is finite and was skipped."""


class SkipCounter:
    """Count the steps of a clipper, and how many of them were skipped.

    Args:
        max_skips: number of consecutive skipped steps, ≥ 1, at which the counter raises. None for never.
    """

    def __init__(self, max_skips: int | None) -> None:
        self.max_skips = max_skips
        self.steps = 0
        """Number of clipper calls."""
        self.skipped = 0
        """Number of skipped steps."""
        self.in_a_row = 0
        """Number of steps skipped since the last one that was not."""
        self.incidents: deque[Incident] = deque(maxlen=100)
        self.prints = True
        """True on the rank that prints warnings, which all ranks of the clipper emit."""

    def refuse(self, step: int, culprits: tuple[Culprit, ...]) -> None:
        """Raise for a step that is not finite.

        Raises:
            NonFiniteError: always.
        """
        self.incidents.append(Incident(step, "raise", culprits))
        raise NonFiniteError(
            f"step {step}: {describe_culprits(culprits)}. No gradient was changed. "
            'Use on_nonfinite="skip" to skip such steps.'
        )

    def record_zeroed(self, step: int, culprits: tuple[Culprit, ...]) -> None:
        """Warn that elements of a step were set to zero."""
        self.incidents.append(Incident(step, "zero", culprits))
        text = f"step {step}: {describe_culprits(culprits)}. They were set to zero."
        warn_user(text, NonFiniteWarning, is_printed=self.prints)

    def record_skip(self, step: int, culprits: tuple[Culprit, ...], *, expected: bool) -> None:
        """Count a step that was skipped because it is not finite.

        Args:
            step: 1-based index of the clipper call.
            culprits: the gradients that are not finite.
            expected: do not warn, because a GradScaler needs such steps to find its scale.

        Raises:
            TooManySkippedSteps: it is the last of `max_skips` in a row.
        """
        self.incidents.append(Incident(step, "skip", culprits))
        self._count(step, describe_skip(culprits))
        if not expected:
            warn_user(
                f"step {step} was skipped ({self.skipped} in total): {describe_culprits(culprits)}.",
                NonFiniteWarning,
                is_printed=self.prints,
            )

    def record_skipped_tensors(self, step: int, culprits: tuple[Culprit, ...]) -> None:
        """Count a step in which some parameters were not stepped, because their gradients are not finite.

        Raises:
            TooManySkippedSteps: it is the last of `max_skips` in a row.
        """
        self.incidents.append(Incident(step, "skip", culprits))
        described = describe_culprits(culprits)
        self._count(step, f"{described}. The other parameters were stepped")
        warn_user(
            f"step {step} skipped parameters ({self.skipped} such steps in total): {described}. The other parameters "
            "were stepped.",
            NonFiniteWarning,
            is_printed=self.prints,
        )

    def record_policy_skip(self, step: int) -> None:
        """Count a step that was skipped by the policy.

        Raises:
            TooManySkippedSteps: it is the last of `max_skips` in a row.
        """
        self._count(step, POLICY_SKIPS)

    def record_update(self) -> None:
        """Count a step that was not skipped."""
        self.in_a_row = 0

    def _count(self, step: int, reason: str) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if error := too_many_skips(step, self.in_a_row, self.max_skips, reason):
            raise error


def describe_skip(culprits: tuple[Culprit, ...]) -> str:
    """Return the reason of a skipped step that is not finite."""
    return f"{describe_culprits(culprits)}. Parameters and optimizer are as they were before the first of them"


def too_many_skips(step: int, in_a_row: int, max_skips: int | None, reason: str) -> TooManySkippedSteps | None:
    """Return the error if a skipped step is the last of `max_skips` in a row, or None.

    Args:
        step: 1-based index of the clipper call.
        in_a_row: number of steps skipped in a row, this one included.
        max_skips: see `SkipCounter`.
        reason: reason of this step.
    """
    if max_skips is None or in_a_row < max_skips:
        return None
    return TooManySkippedSteps(
        f"step {step}: {in_a_row} steps in a row were skipped (max_skips={max_skips}): {reason}."
    )
