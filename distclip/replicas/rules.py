"""Define what happens if replicas differ: the four rules behind `replicas=`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from .compare import ReplicaDifference
from .incidents import ReplicaLog

__all__ = ["RULES", "Off", "Raise", "Repair", "ReplicaRule", "Replicas", "Warn"]

Replicas: TypeAlias = Literal["warn", "raise", "repair", "off"]
"""Name of a rule, as users pass it."""


class ReplicaRule(Protocol):
    """A rule for steps in which replicas differ.

    Every rank applies the rule to the same step, because the ranks have gathered the differences.
    """

    @property
    def compares(self) -> bool:
        """True if replicas are compared at all."""
        ...

    @property
    def needs_host(self) -> bool:
        """True if the host must know in the same step that replicas differ."""
        ...

    def resolve(self, step: int, differences: tuple[ReplicaDifference, ...], log: ReplicaLog) -> bool:
        """Handle a step in which replicas differ.

        Args:
            step: 1-based index of the clipper call.
            differences: the tensors whose replicas differ, at least one.
            log: records and warns.

        Returns:
            True if the replicas of the majority must overwrite the others.

        Raises:
            ReplicaError: on every rank.
        """
        ...


@dataclass(frozen=True, slots=True)
class Warn:
    """Warn, and continue with the gradients as they are."""

    compares = True
    needs_host = False

    def resolve(self, step: int, differences: tuple[ReplicaDifference, ...], log: ReplicaLog) -> bool:
        """Warn."""
        log.warn(step, differences)
        return False


@dataclass(frozen=True, slots=True)
class Raise:
    """Raise `ReplicaError` before any gradient changes."""

    compares = True
    needs_host = True

    def resolve(self, step: int, differences: tuple[ReplicaDifference, ...], log: ReplicaLog) -> bool:
        """Raise."""
        log.refuse(step, differences)
        return False


@dataclass(frozen=True, slots=True)
class Repair:
    """Overwrite replicas that differ by those of the majority, or raise `ReplicaError` if there is none."""

    compares = True
    needs_host = True

    def resolve(self, step: int, differences: tuple[ReplicaDifference, ...], log: ReplicaLog) -> bool:
        """Return True, or raise if a difference cannot be repaired."""
        for difference in differences:
            if not difference.is_exact:
                log.refuse(step, differences, " They are only assumed to be replicas, so that none was overwritten.")
            if not all(difference.names):
                log.refuse(step, differences, " Some ranks have no such tensor, so that none was overwritten.")
            if not difference.has_majority:
                log.refuse(step, differences, " No replica is in the majority, so that none was overwritten.")
        log.record_repair(step, differences)
        return True


@dataclass(frozen=True, slots=True)
class Off:
    """Compare no replicas."""

    compares = False
    needs_host = False

    def resolve(self, step: int, differences: tuple[ReplicaDifference, ...], log: ReplicaLog) -> bool:
        """Return False. The engine never calls this method."""
        return False


RULES: dict[Replicas, ReplicaRule] = {"warn": Warn(), "raise": Raise(), "repair": Repair(), "off": Off()}
"""The rules by the names that users pass."""
