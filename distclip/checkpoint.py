"""What a clipper remembers, as a checkpoint has it: by the names of what has a norm of its own.

Every rank has all of it and the same. Found again by name, it fits another world size and another layout.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .errors import ArgumentError
from .policies import Policy, State
from .sharding.slots import Slots

__all__ = ["policy_kind", "restored", "saved"]


def policy_kind(policy: Policy) -> str:
    """What kind of memory a policy has."""
    return f"{type(policy).__name__}({type(getattr(policy, 'threshold', None)).__name__})"


def saved(state: State, slots: Slots) -> dict[str, dict[str, torch.Tensor]]:
    """{slot name: {key: (rows, …) tensor}}: copies, on CPU."""
    parts = {key: torch.split(value.detach().cpu(), list(slots.counts)) for key, value in state.items()}
    return {name: {key: parts[key][i].clone() for key in state} for i, name in enumerate(slots.names)} if state else {}


def restored(state: State, slots: Slots, told: dict[str, Any]) -> State:
    """A state with what `told` has of it; what that lacks stays as it is, with a warning.

    Raises:
        ArgumentError: a memory of another shape.
    """
    if not state:
        return state
    missing = [name for name in slots.names if name not in told]
    if missing:
        warnings.warn(
            f"the checkpoint has no memory of {len(missing)} of {len(slots.names)} norms ({', '.join(missing[:3])} …): "
            "they start anew.",
            stacklevel=3,
        )
    new: State = {}
    for key, value in state.items():
        parts = []
        for name, own in zip(slots.names, torch.split(value, list(slots.counts)), strict=True):
            part = told.get(name, {}).get(key, own)
            if part.shape != own.shape:
                raise ArgumentError(
                    f"{name}: the checkpoint has a {key!r} of shape {tuple(part.shape)} and this policy one of "
                    f"{tuple(own.shape)}. Resume with the window (and per=) that the run was started with."
                )
            parts.append(part.to(own))
        new[key] = torch.cat(parts)
    return new
