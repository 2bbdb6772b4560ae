"""Keep the steps whose replicas differed, and warn about them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LayoutError, ReplicaError, ReplicaWarning, warn_user
from .compare import ReplicaDifference

__all__ = ["ReplicaIncident", "ReplicaLog", "check_contradiction", "describe_differences"]


@dataclass(frozen=True, slots=True)
class ReplicaIncident:
    """A step in which replicas differed.

    Args:
        step: 1-based index of the clipper call.
        action: what the clipper did: "warn", "raise" or "repair".
        culprits: the tensors whose replicas differ.
    """

    step: int
    action: str
    culprits: tuple[ReplicaDifference, ...]

    def as_fields(self) -> dict[str, Any]:
        """Return the fields of a line in the log."""
        keys = ("kind", "name", "ranks", "group", "norm", "bit")
        return {"replicas": [{key: value for key, value in asdict(c).items() if key in keys} for c in self.culprits]}

    def __str__(self) -> str:
        return f"step {self.step}: {describe_differences(self.culprits)}"


class ReplicaLog:
    """Keeps the last hundred incidents, and warns of the first, second, fourth, eighth ... of them."""

    def __init__(self) -> None:
        self.incidents: deque[ReplicaIncident] = deque(maxlen=100)
        self.prints = True
        """True on the rank that prints warnings, which all ranks of the clipper emit."""
        self._count = 0

    def warn(self, step: int, differences: tuple[ReplicaDifference, ...]) -> None:
        """Record a step, and warn."""
        self._record(step, "warn", differences)
        # Replicas that have diverged once differ in most of the later steps too.
        if self._count & (self._count - 1) == 0:
            often = f" This is step {self._count} of that kind." if self._count > 1 else ""
            text = f"step {step}: {describe_differences(differences)} {differences[0].cause}{often}"
            warn_user(text, ReplicaWarning, is_printed=self.prints)

    def record_repair(self, step: int, differences: tuple[ReplicaDifference, ...]) -> None:
        """Record a step whose replicas are overwritten by those of the majority, and warn."""
        self._record(step, "repair", differences)
        warn_user(
            f"step {step}: {describe_differences(differences)} They were overwritten by those of the majority.",
            ReplicaWarning,
            is_printed=self.prints,
        )

    def refuse(self, step: int, differences: tuple[ReplicaDifference, ...], reason: str = "") -> None:
        """Raise for a step whose replicas differ.

        Raises:
            ReplicaError: always.
        """
        self._record(step, "raise", differences)
        raise ReplicaError(
            f"step {step}: {describe_differences(differences)}{reason} No gradient was changed. {differences[0].cause}"
        )

    def _record(self, step: int, action: str, differences: tuple[ReplicaDifference, ...]) -> None:
        self._count += 1
        self.incidents.append(ReplicaIncident(step, action, differences))


def describe_differences(differences: Sequence[ReplicaDifference]) -> str:
    """Describe which replicas differ, in sentences."""
    more = f" and {len(differences) - 3} more tensors" if len(differences) > 3 else ""
    return f"replicas differ: {', '.join(map(str, differences[:3]))}{more}."


def check_contradiction(differences: Sequence[ReplicaDifference]) -> None:
    """Raise if tensors are declared both as replicas and as different tensors along one axis.

    Raises:
        LayoutError: see above.
    """
    for difference in differences:
        if difference.split_along:
            axes = ", ".join(difference.split_along)
            raise LayoutError(
                f"{difference.name}: its placements declare replicas on {list(difference.group)}, and split_over= "
                f"contains {axes}, along which these ranks hold different tensors. Their gradients differ, so that the "
                "placements are wrong. Use a mesh without this axis for the parameter, or omit the axis in split_over=."
            )
