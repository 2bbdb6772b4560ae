"""Describe policies as the calls that make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any

from ..errors import DistclipError
from .adagc import adagc
from .agc import agc
from .aggc import aggc
from .autoclip import autoclip
from .bi2clip import BiClip
from .budget import Budget
from .ema import ema
from .fixed import Fixed, global_norm, group_norm, per_tensor_norm
from .median_mad import median_mad
from .norm_policy import NormPolicy
from .policy import Policy
from .update_clip import update_clip
from .value import Value
from .zclip import zclip

__all__ = ["describe"]

_PRESETS: Sequence[Callable[..., NormPolicy]] = (
    global_norm,
    per_tensor_norm,
    agc,
    autoclip,
    zclip,
    adagc,
    aggc,
    ema,
    median_mad,
    update_clip,
)


def describe(policy: Policy) -> str:
    """Return the preset's call that makes a policy, without arguments that have their default value.

    Args:
        policy: of any kind. Its `repr` is returned if no preset makes it.

    >>> from distclip import global_norm, group_norm, zclip
    >>> describe(global_norm(0.5)), describe(zclip(cap=1.0)), describe(group_norm({"head": ("^head", 0.5)}, 1.0))
    ('global_norm(0.5)', 'zclip(cap=1.0)', "group_norm({'head': ('^head', 0.5)}, 1.0)")
    """
    if type(policy) is Value:
        return f"value({policy.high})" if policy.low == -policy.high else f"value({policy.low}, {policy.high})"
    if type(policy) is BiClip:
        return f"bi2clip({policy.low}, {policy.high})"
    if type(policy) is Budget:
        usual, known = asdict(Budget()), asdict(policy)
        changed = [f", {name}={known[name]}" for name in ("decay", "cap") if known[name] != usual[name]]
        return f"budget({policy.max_norm}{''.join(changed)})"
    if type(policy) is NormPolicy and policy.has_own_rule:
        if policy.groups and type(policy.threshold) is Fixed and isinstance(bounds := policy.threshold.max_norm, tuple):
            pairs = zip(policy.groups.items(), bounds, strict=False)
            groups = {name: (pattern, bound) for (name, pattern), bound in pairs}
            if group_norm(groups, bounds[-1]) == policy:
                return f"group_norm({groups}, {bounds[-1]})"
        known = asdict(policy) | asdict(policy.threshold)  # type: ignore[call-overload]
        for preset in _PRESETS:
            if (text := _call(preset, known, policy)) is not None:
                return text
    # A repr with an address would differ between runs.
    return re.sub(r" at 0x\w+", "", repr(policy))


def _call(preset: Callable[..., NormPolicy], known: dict[str, Any], policy: NormPolicy) -> str | None:
    """Return the call of a preset with these arguments, or None if it makes another policy."""
    parameters = signature(preset).parameters
    arguments = {name: known[name] for name in parameters if name in known}
    if not arguments.get("groups", True):
        del arguments["groups"]
    try:
        if preset(**arguments) != policy:
            return None
    except DistclipError:
        return None
    changed = [name for name, value in arguments.items() if value != parameters[name].default]
    # The bound of a fixed policy is shown in any case.
    shown = ["max_norm"] * ("max_norm" in arguments and "max_norm" not in changed) + changed
    first = next(iter(parameters))
    return (
        f"{preset.__name__}({', '.join(repr(arguments[n]) if n == first else f'{n}={arguments[n]!r}' for n in shown)})"
    )
