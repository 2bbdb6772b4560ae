"""Apply a different rule to each group of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..norms.reduce import Totals
from .custom import as_rule
from .policy import Rule, State, Threshold

__all__ = ["ByGroup"]


@dataclass(frozen=True, slots=True)
class ByGroup(Rule):
    """Threshold that consists of one threshold for each slot.

    Args:
        thresholds: one for each slot, in order.

    Raises:
        ArgumentError: `thresholds` is empty, or an element is not a threshold.
    """

    thresholds: tuple[Threshold, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        if not self.thresholds:
            raise ArgumentError("thresholds=(): no threshold. Use ByGroup((distclip.Fixed(1.0), distclip.ZScore())).")
        for threshold in self.thresholds:
            if as_rule(threshold).needs_weights or as_rule(threshold).moment_eps is not None:
                raise ArgumentError(
                    f"thresholds: {threshold!r:.80} needs more than the norms of gradients. Use distclip.agc or "
                    "distclip.update_clip for all parameters."
                )

    def init(self, slots: int, device: torch.device) -> State:
        """Return the states of all thresholds before the first step.

        Raises:
            ArgumentError: the number of thresholds differs from the number of slots.
        """
        if slots != len(self.thresholds):
            raise ArgumentError(
                f"thresholds: {len(self.thresholds)} for {slots} norms. Pass one for each group, in the order of "
                "GradClipper.slots."
            )
        states = [as_rule(threshold).init(slots, device) for threshold in self.thresholds]
        return {f"{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound of each slot by the slot's threshold."""
        bounds: list[Tensor] = []
        new_state: State = {}
        for i, threshold in enumerate(self.thresholds):
            rule, prefix = as_rule(threshold), f"{i}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            # Each threshold computes bounds for all slots, and only the bound of its slot is used.
            all_bounds, own = rule(totals, own)
            bounds.append(all_bounds[i].clamp(max=rule.cap))
            new_state |= {prefix + key: value for key, value in own.items()}
        return torch.stack(bounds), new_state
