"""Restart a rule that clips more than half of its window, and warn about a policy that clips that often.

An average of clipped norms can be left behind: once the norms have risen for good, each of them is clipped, and the
average of the clipped norms never reaches them. A restart begins again from the norms before clipping.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ExplodedWarmupWarning, FrequentClippingWarning
from .history import append, zeros
from .policy import Rule, State
from .validation import is_count, is_size

__all__ = ["KEYS", "ClipRate", "init_window", "mask_valid_window", "restart_where_stuck", "where_slot"]

KEYS = ("recent_norms", "recent_clipped", "since_restart", "restarts")
"""Keys of the window's state.

`recent_norms` (slots, window) has the last norms before clipping. `recent_clipped` (slots, window) has bools that are
true where the rule clipped. `since_restart` (slots,) counts the steps since the last restart, and `restarts` (slots,)
counts the restarts.
"""


def init_window(slots: int, window: int, device: torch.device) -> State:
    """Return the window's state before the first step.

    Args:
        slots: number of slots.
        window: number of steps, ≥ 1.
        device: of the norms.
    """
    return {
        "recent_norms": zeros(slots, window, device=device),
        "recent_clipped": torch.zeros(slots, window, dtype=torch.bool, device=device),
        "since_restart": torch.zeros(slots, dtype=torch.int64, device=device),
        "restarts": torch.zeros(slots, dtype=torch.int64, device=device),
    }


def restart_where_stuck(rule: Rule, norms: Tensor, clipped: Tensor, rule_state: State, window_state: State) -> State:
    """Record a step, and restart the rule in the slots where it has clipped more than half of the window.

    Args:
        rule: with `can_restart`.
        norms: (slots,), before clipping.
        clipped: (slots,) bool: the rule itself clips the slot. A norm that only the cap clips does not count, because a
            restart would not change that.
        rule_state: of the rule, after this step.
        window_state: of the window, before this step (`KEYS`).

    Returns:
        Both states after this step, in one dict.

    Host syncs: none. The restart is computed every step and selected on the device.
    """
    position = window_state["since_restart"]
    recent_norms = append(window_state["recent_norms"], position, norms)
    recent_clipped = append(window_state["recent_clipped"], position, clipped)
    since_restart = position + 1
    window = recent_norms.shape[1]
    stuck = (since_restart >= window) & (2 * recent_clipped.sum(1) > window)
    restarted = rule.restart(recent_norms, rule_state)
    return {
        **{key: where_slot(stuck, restarted[key], value) for key, value in rule_state.items()},
        "recent_norms": recent_norms,
        "recent_clipped": recent_clipped,
        "since_restart": torch.where(stuck, 0, since_restart),
        "restarts": window_state["restarts"] + stuck,
    }


def mask_valid_window(window_state: State) -> dict[str, Tensor]:
    """Return masks of the values that a loaded state of the window may have, see `Rule.mask_valid`."""
    return {
        key: is_size(value) if key == "recent_norms" else is_count(value.long()) for key, value in window_state.items()
    }


def where_slot(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Select between two state tensors by slot.

    Args:
        condition: (slots,) bool.
        new: (slots, ...), taken where the condition holds.
        old: (slots, ...), taken elsewhere.
    """
    return torch.where(condition.view(-1, *(1,) * (new.ndim - 1)), new, old)


class ClipRate:
    """Warns once if an adaptive policy clips more than half of the last 128 steps, or has restarted.

    It also warns once if norms exploded in the policy's warm-up.

    Args:
        warn: called as warn(message, category), like `warnings.warn` with a stacklevel that points to the user's line.

    Attributes:
        restarts: number of restarts up to the last recorded step.
        exploded: number of slots whose norms exploded in warm-up, up to the last recorded step.

    >>> rate = ClipRate(lambda message, category: print(category.__name__))
    >>> for step in range(1, 300):
    ...     rate.record(step, clipped=1.0, restarts=0)
    FrequentClippingWarning
    """

    WINDOW = 128

    def __init__(self, warn: Callable[[str, type[Warning]], None]) -> None:
        self.restarts = 0
        self.exploded = 0
        self._warn = warn
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._warned = False

    def trace(self) -> tuple[int, int, deque[float], bool]:
        """Return the values that `restore` needs to forget the steps after this call."""
        return self.restarts, self.exploded, self._recent.copy(), self._warned

    def restore(self, before: tuple[int, int, deque[float], bool]) -> None:
        """Forget the steps since `trace`."""
        self.restarts, self.exploded, self._recent, self._warned = before

    def record(self, step: int, clipped: float, restarts: int, exploded: int = 0) -> None:
        """Record a finite step.

        Args:
            step: 1-based index of the step.
            clipped: fraction of the slots that was clipped, in [0, 1]. 0 for a policy without state, because the user
                has chosen its bound.
            restarts: number of restarts of the policy so far, over all slots.
            exploded: number of slots whose norms exploded during warm-up, see `warmup.py`.
        """
        if exploded > self.exploded:
            self._warn(
                f"step {step}: the norms rose severalfold in the policy's warm-up, which no cap bounds. "
                "The policy starts from the norms before that. If training has diverged, start it again with cap=1.0, "
                "or the max_norm that you would use otherwise.",
                ExplodedWarmupWarning,
            )
        self.exploded = exploded
        self._recent.append(clipped)
        restarted = restarts > self.restarts
        self.restarts = restarts
        frequent = len(self._recent) == self.WINDOW and 2 * sum(self._recent) > self.WINDOW
        if self._warned or not (frequent or restarted):
            return
        self._warned = True
        action = " and restarted from their norms before clipping" if restarted else ""
        self._warn(
            f"step {step}: the policy clipped more than half of the last steps{action}. Clipping that often acts like "
            "a smaller learning rate. Use a smaller learning rate, or a higher bound.",
            FrequentClippingWarning,
        )
