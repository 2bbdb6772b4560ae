"""Adapt a threshold of the user's, which needs only two methods, to the interface of `Rule`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..norms.reduce import Totals
from .policy import Rule, State, Threshold

__all__ = ["as_rule"]


def as_rule(threshold: Threshold) -> Rule:
    """Return a `Rule` unchanged, and wrap any other threshold into one.

    Args:
        threshold: an object with the two methods of `Threshold`. Members of `Rule` that it has replace the defaults.

    Raises:
        ArgumentError: one of the two methods is missing.
    """
    if isinstance(threshold, Rule):
        return threshold
    if isinstance(threshold, type) or not callable(threshold) or not callable(getattr(threshold, "init", None)):
        raise ArgumentError(
            f"threshold={threshold!r:.80}: expected an object with the methods init(slots, device) and "
            "__call__(totals, state). Use threshold=distclip.Fixed(1.0), for example."
        )
    return _CustomRule(threshold)


class _CustomRule(Rule):
    """Rule around a threshold that does not subclass `Rule`."""

    def __init__(self, threshold: Any) -> None:
        self._threshold = threshold
        self.needs_weights = bool(getattr(threshold, "needs_weights", Rule.needs_weights))
        self.can_restart = callable(getattr(threshold, "restart", None))
        self.cap = float(getattr(threshold, "cap", Rule.cap))

    def init(self, slots: int, device: torch.device) -> State:
        """Return the threshold's state before the first step."""
        return dict(self._threshold.init(slots, device))

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the threshold's bounds and state."""
        bounds, state = self._threshold(totals, state)
        return bounds, state

    def restart(self, norms: Tensor, state: State) -> State:
        """Return the threshold's state after a restart."""
        return dict(self._threshold.restart(norms, state))
