"""Convert the state of a policy to {slot name: tensors} and back, so that a checkpoint fits any layout.

Every rank has the whole state, which is the same on all ranks. A slot is found by its name, so that a checkpoint can be
loaded with another world size and another layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, warn_user
from .policies import Policy, State
from .policies.norm_policy import WATCH_PREFIX
from .policies.policy import CheckedPolicy
from .policies.warmup import KEYS as FIRST_NORMS
from .sharding.slots import SlotMap

__all__ = [
    "VERSION",
    "check_state_dict",
    "check_version",
    "pack_state",
    "policy_kind",
    "unpack_counts",
    "unpack_state",
    "upgrade",
]

VERSION = 1
"""Version of the format of `GradClipper.state_dict`."""

_MAX_COUNT = 2**53
"""Largest counter that a checkpoint may have."""

_KEYS = {"version", "rule", "counts", "state"}

_OLD_NAMES = {
    "reseeds": "restarts",
    "recent": "recent_norms",
    "over": "recent_clipped",
    "seen": "since_restart",
    "logs": "log_norms",
}
"""Names of counters and tensors before version 1, which had no version number."""


def policy_kind(policy: Policy) -> str:
    """Return the name of the kind of state that a policy has.

    >>> from distclip import zclip
    >>> policy_kind(zclip())
    'NormPolicy(ZScore)'
    """
    return f"{type(policy).__name__}({type(getattr(policy, 'threshold', None)).__name__})"


def check_state_dict(state_dict: Mapping[str, Any], policy: Policy) -> None:
    """Raise unless a state dict is of this version and of a policy of the same kind.

    Args:
        state_dict: result of `GradClipper.state_dict`.
        policy: policy of the clipper that loads it.

    Raises:
        ArgumentError: see above.
    """
    _check_mapping("state_dict", state_dict)
    unknown, missing = sorted(set(state_dict) - _KEYS), sorted(_KEYS - set(state_dict))
    if unknown or missing:
        raise ArgumentError(
            f"state_dict: unknown keys {unknown}, missing keys {missing}. Pass what GradClipper.state_dict() returned."
        )
    check_version(state_dict)
    if state_dict["rule"] != policy_kind(policy):
        raise ArgumentError(
            f"state_dict: it has the state of {state_dict['rule']}, and the policy is {policy_kind(policy)}. Resume "
            "with the policy that the run was started with, or leave the clipper's state out."
        )


def check_version(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state dict is of this version.

    Raises:
        ArgumentError: see above.
    """
    # True equals 1, but it is not a version.
    if _to_count(state_dict.get("version")) != VERSION:
        raise ArgumentError(
            f"state_dict: format version {state_dict.get('version')!r:.60}, expected {VERSION}. Use the release of "
            "distclip that saved it, or leave the clipper's state out."
        )


def upgrade(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a state dict from before version 1, and return any other as it is."""
    _check_mapping("state_dict", state_dict)
    if "version" in state_dict or not {"rule", "counts", "state"} <= set(state_dict):
        return state_dict
    for key in ("counts", "state"):
        _check_mapping(key, state_dict[key])
    for slot, values in state_dict["state"].items():
        _check_mapping(f"state[{slot!r}]", values)

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {_OLD_NAMES.get(name, name): value for name, value in values.items()}

    state = {slot: renamed(values) for slot, values in state_dict["state"].items()}
    return {**state_dict, "version": 1, "counts": renamed(state_dict["counts"]), "state": state}


def pack_state(state: State, slots: SlotMap) -> dict[str, dict[str, Tensor]]:
    """Copy the state of every slot to the CPU, by slot name.

    Args:
        state: state of the policy, as tensors whose first dim is the slot.
        slots: slots of the clipper.

    Returns:
        {slot name: {key: (rows, …) tensor}}.

    Host syncs: one per key.
    """
    parts = {key: torch.split(value.detach().cpu(), list(slots.counts)) for key, value in state.items()}
    return {name: {key: parts[key][i].clone() for key in state} for i, name in enumerate(slots.names)} if state else {}


def unpack_state(state: State, slots: SlotMap, saved: Mapping[str, Mapping[str, Any]], policy: CheckedPolicy) -> State:
    """Return a state with the values of a checkpoint.

    A slot that the checkpoint lacks keeps its value, with a warning.

    Args:
        state: present state of the policy. The checkpoint must have the same keys, shapes and dtypes.
        slots: slots of the clipper.
        saved: see `pack_state`.
        policy: policy of the clipper.

    Raises:
        ArgumentError: another key, shape or dtype, or a value that no step of the policy can produce, such as NaN.
    """
    _check_mapping("state", saved)
    if not state:
        return state
    missing = [name for name in slots.names if name not in saved]
    if missing:
        warn_user(
            f"state_dict: no state for {len(missing)} of {len(slots.names)} norms ({', '.join(missing[:3])} …). They "
            "start like those of a new clipper.",
            UserWarning,
        )
    columns = {key: torch.split(value, list(slots.counts)) for key, value in state.items()}
    loaded: dict[str, list[Tensor]] = {key: [] for key in state}
    for i, name in enumerate(slots.names):
        current = {key: column[i] for key, column in columns.items()}
        values = _match_optional(saved.get(name, current), current)
        _check_keys(f"state[{name!r}]", values, state)
        for key, column in columns.items():
            value, own = values[key], column[i]
            if isinstance(value, Tensor) and (value.is_meta or value.layout != own.layout):
                raise ArgumentError(
                    f"state_dict: {key!r} of {name} is a tensor without values, or a sparse one. Pass what "
                    "GradClipper.state_dict() returned."
                )
            if not isinstance(value, Tensor) or value.shape != own.shape:
                raise ArgumentError(
                    f"state_dict: {key!r} of {name} has shape {tuple(getattr(value, 'shape', ()))}, and this policy "
                    f"needs {tuple(own.shape)}. Resume with the window (and per=) that the run was started with."
                )
            if _kind_of(value.dtype) != _kind_of(own.dtype):
                raise ArgumentError(
                    f"state_dict: {key!r} of {name} has dtype {value.dtype}, and this policy needs {own.dtype}. Pass "
                    "what GradClipper.state_dict() returned."
                )
            loaded[key].append(value.to(own))
    new_state = {key: torch.cat(parts) for key, parts in loaded.items()}
    counts = list(slots.counts)
    for key, valid in policy.mask_valid(new_state).items():
        by_slot = zip(slots.names, torch.split(valid, counts), torch.split(new_state[key], counts), strict=True)
        for name, mask, loaded_values in by_slot:
            if not bool(mask.all()):
                raise ArgumentError(
                    f"state_dict: {key!r} of {name} has the value {loaded_values[~mask][0].item()!r}, which no step of "
                    "the policy leads to. Load an earlier checkpoint, or leave the clipper's state out."
                )
    return new_state


def _match_optional(values: Mapping[str, Any], current: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return the values of a slot, with the optional ones only if this policy keeps them.

    Only a policy without a cap keeps the norms of the warm-up, and only one with `watch` keeps the values of a scalar.
    A run may be resumed with another cap or `watch`, and checkpoints of earlier releases lack the optional values.
    """
    if not isinstance(values, Mapping):
        return values
    kept = {key: value for key, value in current.items() if _is_optional(key)}
    return kept | {key: value for key, value in values.items() if key in current or not _is_optional(key)}


def _is_optional(key: Any) -> bool:
    return key in FIRST_NORMS or str(key).startswith(WATCH_PREFIX)


def unpack_counts(saved: Mapping[str, Any], names: Collection[str]) -> dict[str, int]:
    """Return the counters of a checkpoint.

    Args:
        saved: {name: 0-d integer tensor}.
        names: the counters that a clipper has.

    Raises:
        ArgumentError: another name, a value that is not a whole number ≥ 0, or more steps skipped in a row than in
            total.
    """
    _check_keys("counts", saved, names)
    counts = {name: _to_count(saved[name]) for name in names}
    for name, count in counts.items():
        if count is None:
            raise ArgumentError(
                f"state_dict: counts[{name!r}]={saved[name]!r:.80} is not a whole number ≥ 0. Pass what "
                "GradClipper.state_dict() returned."
            )
    known = {name: count for name, count in counts.items() if count is not None}
    if known.get("in_a_row", 0) > known.get("skipped", 0):
        raise ArgumentError(
            f"state_dict: counts has {known['in_a_row']} steps skipped in a row, and {known['skipped']} in all. Pass "
            "what GradClipper.state_dict() returned."
        )
    return known


def _to_count(value: Any) -> int | None:
    """Return a counter of a checkpoint as a number, or None if it is not one."""
    if isinstance(value, Tensor) and (value.is_meta or value.numel() != 1):
        return None
    try:
        # A bool is a number in Python, but it is not a counter.
        count: Any = value.item() if isinstance(value, Tensor) else value
        return None if isinstance(count, bool) or not 0 <= index(count) <= _MAX_COUNT else index(count)
    except TypeError:
        return None


def _check_mapping(where: str, saved: Any) -> None:
    """Raise unless a part of a state dict is a dictionary with text as keys."""
    if not isinstance(saved, Mapping) or not all(isinstance(key, str) for key in saved):
        raise ArgumentError(
            f"state_dict: {where}={saved!r:.60} is not a dictionary. Pass what GradClipper.state_dict() returned."
        )


def _kind_of(dtype: torch.dtype) -> str:
    """Return the kind of a dtype."""
    # A floating point state may come from a device with another accumulation dtype.
    return "bool" if dtype == torch.bool else "floating point" if dtype.is_floating_point else str(dtype)


def _check_keys(where: str, saved: Mapping[str, Any], expected: Collection[str]) -> None:
    """Raise unless a part of a state dict has exactly the expected keys."""
    _check_mapping(where, saved)
    unknown, missing = sorted(set(saved) - set(expected)), sorted(set(expected) - set(saved))
    if unknown or missing:
        raise ArgumentError(
            f"state_dict: {where} has unknown keys {unknown} and lacks {missing}. Pass what GradClipper.state_dict() "
            "returned; restart_after= and window= must be those of the run."
        )
