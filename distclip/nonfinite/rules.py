"""Define the four rules of `on_nonfinite`, which handle a non-finite step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from ..sharding.shard import Shard
from .culprits import Culprit, zero_nonfinite_
from .skip_counter import SkipCounter

__all__ = ["RULES", "NonFiniteRule", "OnNonFinite", "Propagate", "Raise", "Skip", "Zero"]

OnNonFinite: TypeAlias = Literal["raise", "skip", "zero", "propagate"]
"""Name of a rule, as users pass it."""


class NonFiniteRule(Protocol):
    """A rule for steps that are not finite.

    Every rank applies the rule to the same step, because it depends on the totals alone, which all ranks share.
    """

    @property
    def leaves_step_out(self) -> bool:
        """True if a non-finite step leaves parameters, optimizer and policy state unchanged."""
        ...

    @property
    def needs_host(self) -> bool:
        """True if the host must read in the same step whether the gradients are finite."""
        ...

    def resolve(self, step: int, shards: Iterable[Shard], culprits: tuple[Culprit, ...], counter: SkipCounter) -> bool:
        """Handle a step that the host has found to be non-finite.

        Args:
            step: 1-based index of the clipper call.
            shards: the gradients of this rank.
            culprits: the non-finite gradients of all ranks.
            counter: counts and warns.

        Returns:
            True if the gradients have been repaired, so that they must be measured again. False if the step is skipped.

        Raises:
            NonFiniteError, TooManySkippedSteps: on every rank.
        """
        ...


@dataclass(frozen=True, slots=True)
class Skip:
    """Skip the step.

    Args:
        expected: do not warn, because a GradScaler needs such steps to find its scale.
    """

    expected: bool = False
    leaves_step_out = True
    needs_host = False

    def resolve(self, step: int, shards: Iterable[Shard], culprits: tuple[Culprit, ...], counter: SkipCounter) -> bool:
        """Count the step and warn."""
        counter.record_skip(step, culprits, expected=self.expected)
        return False


@dataclass(frozen=True, slots=True)
class Raise:
    """Raise `NonFiniteError` before any gradient changes."""

    leaves_step_out = True
    needs_host = True

    def resolve(self, step: int, shards: Iterable[Shard], culprits: tuple[Culprit, ...], counter: SkipCounter) -> bool:
        """Raise."""
        counter.refuse(step, culprits)
        return False


@dataclass(frozen=True, slots=True)
class Zero:
    """Set the elements that are not finite to 0, and clip the others."""

    leaves_step_out = True
    needs_host = True

    def resolve(self, step: int, shards: Iterable[Shard], culprits: tuple[Culprit, ...], counter: SkipCounter) -> bool:
        """Set elements to 0, or skip the step if only its norm overflows."""
        if not culprits:
            counter.record_skip(step, culprits, expected=False)
            return False
        zero_nonfinite_(shards)
        counter.record_zeroed(step, culprits)
        return True


@dataclass(frozen=True, slots=True)
class Propagate:
    """Compute with the numbers as they are, as torch does."""

    leaves_step_out = False
    needs_host = False

    def resolve(self, step: int, shards: Iterable[Shard], culprits: tuple[Culprit, ...], counter: SkipCounter) -> bool:
        """Return False. The engine never calls this method."""
        return False


RULES: dict[OnNonFinite, NonFiniteRule] = {"raise": Raise(), "skip": Skip(), "zero": Zero(), "propagate": Propagate()}
"""The rules by the names that users pass."""
