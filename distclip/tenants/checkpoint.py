"""Save and load the state of each group under its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..checkpoint import VERSION, check_version, policy_kind, unpack_counts, unpack_state
from ..errors import ArgumentError, warn_user
from ..sharding.slots import SlotMap
from .counts import GroupCounts
from .engine import IsolatedEngine

__all__ = ["group_state_dict", "load_groups"]

_KEYS = {"version", "rule", "counts", "state"}


def group_state_dict(engine: IsolatedEngine, name: str) -> dict[str, Any]:
    """Return the state and the counters of a group, see `GradClipper.state_dict`.

    Raises:
        ArgumentError: there is no such group.
    """
    _check_group(engine, name)
    counts = asdict(engine.counters[name])
    state = engine.policy.state_of(name, engine.state)
    return {
        "version": VERSION,
        "rule": policy_kind(engine.policy.policies[name]),
        "counts": {key: torch.tensor(count) for key, count in counts.items()},
        "state": {key: value.detach().cpu().clone() for key, value in state.items()},
    }


def load_groups(
    engine: IsolatedEngine, state_dict: Mapping[str, Any], group: str | None, names: Collection[str]
) -> dict[str, int]:
    """Load the state of one group, or of all groups. If it raises, nothing is loaded.

    Args:
        engine: engine of the clipper.
        state_dict: result of `GradClipper.state_dict`.
        group: name of a single group. None for the state of all groups.
        names: names of the clipper's counters.

    Returns:
        The counters of the clipper, empty for one group.

    Raises:
        ArgumentError: see `GradClipper.load_state_dict`.
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(
            f"state_dict={state_dict!r:.60}: not a dictionary. Pass what GradClipper.state_dict() returned."
        )
    counts: dict[str, int] = {}
    if group is not None:
        _check_group(engine, group)
        saved: dict[str, Any] = {group: state_dict}
    else:
        if not isinstance(state_dict.get("groups"), Mapping):
            raise ArgumentError(
                "state_dict: it has no state of groups, and the clipper has isolate=True. Pass what state_dict() of "
                "such a clipper returned, or group=name for the state of one group."
            )
        check_version(state_dict)
        saved = dict(state_dict["groups"])
        counts = unpack_counts(state_dict.get("counts", {}), names)
        missing = [name for name in engine.counters.names if name not in saved]
        unknown = [name for name in saved if name not in engine.counters]
        if missing or unknown:
            warn_user(
                f"state_dict: it lacks the groups {missing[:3]}, which start like new ones, and has {unknown[:3]}, "
                "which the clipper does not have.",
                UserWarning,
            )
    state, group_counts = engine.state, {}
    for name, one in saved.items():
        if name not in engine.counters:
            continue
        policy = engine.policy.policy_of(name)
        kind = policy_kind(engine.policy.policies[name])
        if not isinstance(one, Mapping) or set(one) != _KEYS or one["rule"] != kind:
            raise ArgumentError(
                f"state_dict: the state of group {name!r} is not one of {kind}. Pass what state_dict(group=…) "
                "returned, for a group with the same policy."
            )
        check_version(one)
        current = engine.policy.state_of(name, state)
        values = unpack_state(current, SlotMap((name,)), {name: one["state"]}, policy)
        state = engine.policy.with_state_of(name, state, values)
        group_counts[name] = unpack_counts(one["counts"], ("steps", "skipped", "in_a_row"))
    engine.state = state
    for name, found in group_counts.items():
        engine.counters[name] = GroupCounts(**found)
    return counts


def _check_group(engine: IsolatedEngine, name: str) -> None:
    """Raise unless a clipper has a group."""
    if name not in engine.counters:
        raise ArgumentError(f"group={name!r}: no such group. Use one of {list(engine.counters.names)}.")
