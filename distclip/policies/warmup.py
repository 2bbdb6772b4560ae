"""Detect a warm-up in which the norms explode, and start the rule from the norms before the explosion.

A rule without a cap clips nothing while it has no history. If training diverges in these steps, the rule would take the
norms of the explosion for the normal level, and would clip nothing from then on. The norm of the whole gradient, or of
a group, explodes if it rises severalfold within a warm-up. The norm of a single tensor may do so in a healthy run: a
tensor behind a layer that starts at zero has a gradient that grows from zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import host_reads_free
from .history import append, quantile, zeros
from .policy import Rule, State
from .restart import where_slot
from .validation import is_count, is_size

__all__ = ["KEYS", "LEAST_WARMUP", "RISE", "init_first_norms", "mask_valid_first_norms", "restart_where_exploded"]

KEYS = ("first_norms", "num_first", "exploded_warmups")
"""Keys of the state.

`first_norms` (slots, warmup) has the norms of the warm-up before clipping. `num_first` (slots,) counts them, and
`exploded_warmups` (slots,) is 1 once the rule has started from the norms before an explosion.
"""

LEAST_WARMUP = 8
"""Length of the shortest warm-up that is checked for an explosion."""

RISE = 4.0
"""Factor by which norms must rise to count as an explosion.

The rise is measured from the median of the first quarter of the warm-up to the median of its second half. Neither the
scatter of single norms nor a learning rate that grows from 0 is likely to cause such a rise.
"""


def init_first_norms(slots: int, warmup: int, device: torch.device) -> State:
    """Return the state before the first step.

    Args:
        slots: number of slots.
        warmup: number of norms in the warm-up, ≥ `LEAST_WARMUP`.
        device: of the norms.
    """
    count = torch.zeros(slots, dtype=torch.int64, device=device)
    return {"first_norms": zeros(slots, warmup, device=device), "num_first": count, "exploded_warmups": count.clone()}


def restart_where_exploded(rule: Rule, norms: Tensor, rule_state: State, state: State) -> State:
    """Record a norm of the warm-up, and restart the rule if the norms exploded in it.

    Args:
        rule: with `unbounded_steps` > 0.
        norms: (slots,), before clipping.
        rule_state: of the rule, after this step.
        state: the warm-up's state before this step (`KEYS`).

    Returns:
        Both states after this step, in one dict.

    Host syncs: none.
    """
    history, count = state["first_norms"], state["num_first"]
    warmup = history.shape[1]
    if host_reads_free(norms.device) and bool((count >= warmup).all()):
        return rule_state | {key: state[key] for key in KEYS}
    in_warmup = count < warmup
    history = where_slot(in_warmup, append(history, count, norms), history)
    early, late = history[:, : warmup // 4], history[:, warmup // 2 :]
    level = _median(early)
    exploded = in_warmup & (count + 1 == warmup) & (_median(late) > RISE * level)
    # The explosion can begin in the first quarter. Its norms must not widen the scatter from which the rule starts.
    restarted = rule.restart(torch.minimum(early, 2 * level.unsqueeze(1)), rule_state)
    return {
        **{key: where_slot(exploded, restarted[key], value) for key, value in rule_state.items()},
        "first_norms": history,
        "num_first": count + in_warmup,
        "exploded_warmups": state["exploded_warmups"] + exploded,
    }


def mask_valid_first_norms(state: State) -> dict[str, Tensor]:
    """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
    return {key: is_size(value) if key == "first_norms" else is_count(value) for key, value in state.items()}


def _median(history: Tensor) -> Tensor:
    """Return the median of each slot, (slots,), of a full history."""
    return quantile(history, torch.full_like(history[:, 0], history.shape[1], dtype=torch.int64), 0.5)
